"""Who owns each page: nobody (free), a request, or the prefix tree."""

from __future__ import annotations

import numpy as np

from .prefix_cache import NO_PAGES, RadixCache


class PagePool:
    """Hands out page numbers; takes them from the prefix tree when none is free. Knows no memory and no tensor."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.tree = RadixCache(page_size)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack: page 0 is handed out first
        self.num_free = num_pages

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones that nobody uses."""
        return self.num_free + self.tree.num_evictable

    def allocate(self, n: int) -> np.ndarray:
        """n pages, [n] int32, now the caller's; n must be at most num_available."""
        if n == 0:
            return NO_PAGES
        if n > self.num_free:
            self.release(self.tree.evict(n - self.num_free))
        self.num_free -= n
        pages: np.ndarray = self._free[self.num_free : self.num_free + n].copy()
        return pages

    def release(self, pages: np.ndarray) -> None:
        """Give pages back; they are free."""
        assert self.num_free + len(pages) <= self.num_pages, "a page was released twice"
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)

    def free_pages(self) -> np.ndarray:
        """The free pages, in no particular order (for the invariants of the tests)."""
        free: np.ndarray = self._free[: self.num_free].copy()
        return free
