"""The pages of the KV cache: each is free, or belongs to a request or to the prefix tree."""

from __future__ import annotations

import numpy as np

from .prefix_cache import NO_PAGES, RadixCache


class PagePool:
    """Page numbers without memory; evicts pages from the prefix tree when none is free."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.tree = RadixCache(page_size)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack with page 0 on top
        self.num_free = num_pages

    @property
    def num_available(self) -> int:
        """The pages that `allocate` can return: free ones and unused cached ones."""
        return self.num_free + self.tree.num_evictable

    def allocate(self, n: int) -> np.ndarray:
        """Return n pages [n] int32, which belong to the caller; n must be at most num_available."""
        if n == 0:
            return NO_PAGES
        if n > self.num_free:
            self.release(self.tree.evict(n - self.num_free))
        self.num_free -= n
        pages: np.ndarray = self._free[self.num_free : self.num_free + n].copy()
        return pages

    def release(self, pages: np.ndarray) -> None:
        """Free pages."""
        assert self.num_free + len(pages) <= self.num_pages, "a page was released twice"
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)

    def free_pages(self) -> np.ndarray:
        """Return the free pages in no particular order, for the invariants of the tests."""
        free: np.ndarray = self._free[: self.num_free].copy()
        return free
