"""Ray Serve's choice of a replica for a request: the longest cached prefix, unless that replica is much busier."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator
from itertools import takewhile
from typing import Any

import numpy as np
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .failed_replicas import forget_others, is_avoided

log = logging.getLogger(__name__)
REPORT_S = 30.0  # a lack of replicas is logged this often
SPREAD = 8  # a replica with this many requests more than the least busy one may be chosen for its cache


class PrefixAffinity:
    """An estimate of the prefix cache of each replica: the pages of the prompts that were sent to it.

    A page is known by the hash of all tokens up to its end. For each replica at most `num_pages` pages are kept; the
    least recently used are dropped first, as in the cache itself.
    """

    def __init__(self, page_size: int, num_pages: int) -> None:
        self._page_size, self._num_pages = page_size, num_pages
        self._pages: dict[str, OrderedDict[int, None]] = {}  # replica -> its pages, the least recently used first

    def num_cached(self, tokens: np.ndarray, replica: str, salt: str | None = None) -> int:
        """Return how many of the first `tokens` are in the replica's cache, under this salt."""
        pages = self._pages.get(replica, OrderedDict())
        return sum(self._page_size for _ in takewhile(pages.__contains__, self._hashes(tokens, salt)))

    def add(self, tokens: np.ndarray, replica: str, salt: str | None = None) -> None:
        pages = self._pages.setdefault(replica, OrderedDict())
        for page in reversed(list(self._hashes(tokens, salt))):  # a prefix is used as often as its continuations
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > self._num_pages:
            pages.popitem(last=False)

    def keep(self, replicas: Collection[str]) -> None:
        self._pages = {replica: pages for replica, pages in self._pages.items() if replica in replicas}

    def _hashes(self, tokens: np.ndarray, salt: str | None) -> Iterator[int]:
        prefix_hash = hash(salt)
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            prefix_hash = hash((prefix_hash, tokens[start : start + self._page_size].tobytes()))
            yield prefix_hash


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Runs in the front end, which sends all requests; the first argument of a call is a runtime Request."""

    _reported_at = -math.inf  # time.monotonic of the last report of a lack of replicas

    def initialize_state(self, page_size: int, num_pages: int) -> None:
        self._affinity = PrefixAffinity(page_size, num_pages)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        self._affinity.keep(names)
        forget_others(names)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the candidates that have not failed, best first; a request waits only if all of them are full."""
        usable = [replica for replica in candidate_replicas if not is_avoided(replica.replica_id.unique_id)]
        if pending_request is None:
            return [usable]
        pending_request.routing_context.should_backoff = not usable  # else Serve would ask again without a pause
        if not usable and time.monotonic() - self._reported_at > REPORT_S:
            self._reported_at = time.monotonic()
            log.warning("no replica runs: requests wait until Ray Serve has started one; see serve status")
        loads = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in usable}
        least = min(loads.values(), default=0)
        request = pending_request.args[0]

        def rank(replica: RunningReplica) -> tuple[int, int, float]:
            load, name = loads[replica.replica_id], replica.replica_id.unique_id
            num_cached = (
                self._affinity.num_cached(request.tokens, name, request.cache_salt) if load <= least + SPREAD else 0
            )
            return (-num_cached, load, random.random())

        return [[replica] for replica in sorted(usable, key=rank)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = pending_request.args[0]
        self._affinity.add(request.tokens, replica_id.unique_id, request.cache_salt)
