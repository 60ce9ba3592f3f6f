"""Which replica has most of a prompt in its prefix cache, as far as the one who sent it there can tell.

A page's content is known by the hash of all tokens up to its end. For each replica the pages of the prompts that it was
sent are kept, as many as its cache holds, the least recently used forgotten first, as the cache itself does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import takewhile

import numpy as np


class Affinity:
    """Of any number of replicas, known by their names, with `num_pages` pages of `page_size` tokens each."""

    def __init__(self, page_size: int, num_pages: int) -> None:
        self._page_size, self._num_pages = page_size, num_pages
        self._pages: dict[str, OrderedDict[int, None]] = {}  # of each replica, the least recently used first

    def matched(self, tokens: np.ndarray, replica: str) -> int:
        """How many of the first `tokens` are in the replica's cache."""
        pages = self._pages.get(replica, OrderedDict())
        return sum(self._page_size for _ in takewhile(pages.__contains__, self._hashes(tokens)))

    def sent(self, tokens: np.ndarray, replica: str) -> None:
        """The replica has been sent a prompt of these tokens."""
        pages = self._pages.setdefault(replica, OrderedDict())
        for page in reversed(list(self._hashes(tokens))):  # a prefix is used as often as what continues it
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > self._num_pages:
            pages.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        self._pages = {replica: pages for replica, pages in self._pages.items() if replica in replicas}

    def _hashes(self, tokens: np.ndarray) -> Iterator[int]:
        so_far = 0
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            so_far = hash((so_far, tokens[start : start + self._page_size].tobytes()))
            yield so_far
