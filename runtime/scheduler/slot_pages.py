"""The pages of running requests: the cached prefix that each shares, what it gets and shares, and what it frees."""

from __future__ import annotations

import numpy as np

from ..limits import Limits
from ..request import Request
from .prefix_cache import NO_PAGES, Node, PagePool
from .slots import Slots
from .window_pages import BlockPool, WindowPages


class SlotPages:
    """Moves pages between the pool, the prefix cache and the slots."""

    def __init__(self, limits: Limits, slots: Slots, pool: PagePool) -> None:
        self._limits, self._slots, self._pool, self._tree = limits, slots, pool, pool.tree
        # Of layers with a window, if others see all keys.
        self._windows = WindowPages(limits, slots, pool) if isinstance(pool, BlockPool) else None

    def find(self, count: int) -> bool:
        """Return whether so many pages are available, if need be after freeing those that no layer sees any more."""
        if count > self._pool.num_available and self._limits.window is not None:
            running, first_pages = self._slots.running, self._first_seen_pages(self._limits.window)
            for i in np.flatnonzero(first_pages > self._slots.num_freed_pages[running]).tolist():
                self._free_unseen(int(running[i]), int(first_pages[i]))
        return count <= self._pool.num_available

    def num_free(self) -> int:
        """Return the available pages, and those that running requests do not share and no layer sees any more."""
        if self._limits.window is None:
            return self._pool.num_available
        kept = self._slots.num_shared_pages[self._slots.running]
        unseen = np.maximum(self._first_seen_pages(self._limits.window) - kept, 0)
        return self._pool.num_available + int(unseen.sum())

    def drop_unseen(self) -> bool:
        """Drop the pages that layers with a window do not see any more, if other layers see all keys.

        Returns whether there were any.
        """
        return self._windows is not None and self._windows.drop_unseen()

    def num_missing(self, slot: int, end: int) -> int:
        """Return the entries that the page tables of a slot lack for its tokens before `end`."""
        return max(0, self._limits.pages_for(end) - int(self._slots.num_pages[slot]))

    def extend_each(self, slots: np.ndarray) -> None:
        """Give each of `slots` [n] int32 the pages for its next token."""
        if len(slots):
            pages = self._pool.allocate(len(slots))
            others = None if self._windows is None else self._windows.extend(slots, 1)
            self._slots.append_page_each(slots, pages, others)

    def extend(self, slot: int, end: int) -> None:
        """Give a slot the pages for its tokens before `end`, and share those that these complete."""
        count = self.num_missing(slot, end)
        pages = self._pool.allocate(count)
        others = None if self._windows is None else self._windows.extend(np.array([slot]), count)
        self._slots.append_pages(slot, pages, others)
        self._share(slot, end)

    def lock_prefix(self, request: Request) -> tuple[Node, np.ndarray] | None:
        """Lock the longest cached prefix of a request; return its node and pages, or None if the other pages lack.

        With a window a prefix may leave no room for what follows it. It is not used then, if nothing else runs.
        """
        limits, tree, num_running = self._limits, self._tree, len(self._slots.running)
        for uses_cache in (True, False):
            node, pages = self._match(request) if uses_cache else (tree.root_of(request.cache_salt), NO_PAGES)
            tree.lock(node)
            needed = self._num_needed(limits.pages_for(len(request.tokens)) - len(pages), pages)
            if self.find(needed + num_running * limits.num_tables):  # one more page for each running request
                return node, pages
            tree.unlock(node)
            if limits.window is None or num_running:
                break
        return None

    def begin(self, slot: int, pages: np.ndarray) -> None:
        """Enter the pages of a slot's cached prefix, which the tree keeps."""
        others = None if self._windows is None else self._windows.begin(slot, pages)
        self._slots.append_pages(slot, pages, others)
        self._slots.num_shared_pages[slot] = len(pages)

    def release(self, slot: int) -> None:
        """Take all pages of a slot. Whole ones go to the tree; duplicates and the last, partial one go to the pool.

        So do all of its pages if it has freed some: a sequence in the tree has all of its pages.
        """
        s, size, shared = self._slots, self._limits.page_size, int(self._slots.num_shared_pages[slot])
        pages = s.page_table[slot, : s.num_pages[slot]].copy()
        kept = shared
        if self._limits.enable_prefix_caching and not s.num_freed_pages[slot]:
            kept = max(shared, int(min(s.num_computed[slot], s.num_known[slot])) // size)
            tokens, above = s.tokens[slot, shared * size : kept * size], s.prefix_nodes[slot]
            _, num_present = self._tree.insert(tokens, pages[shared:kept], above)
            if self._windows is not None:
                self._windows.share(slot, shared, self._tree.match(tokens, above)[1])
            self._pool.release(pages[shared : shared + num_present])
        self._pool.release(pages[kept:])
        self._tree.unlock(s.prefix_nodes[slot])
        if self._windows is not None:
            self._windows.release(slot)

    def _num_needed(self, count: int, prefix: np.ndarray) -> int:
        """Return the pages that a request needs for `count` pages of tokens after its cached prefix."""
        if self._windows is None:
            return min(count, self._limits.pages_at_once(self._limits.max_length))
        return count + self._windows.num_needed(count, prefix)

    def _match(self, request: Request) -> tuple[Node, np.ndarray]:
        """Return the longest cached prefix of a request's tokens: the tree's node, and the pages [n] int32.

        The last token is always computed, because its hidden state gives the next one. A request for prompt
        log-probabilities computes all tokens: the cache has keys and values, but no hidden states.
        """
        root = self._tree.root_of(request.cache_salt)
        if not self._limits.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return root, NO_PAGES
        size, tokens = self._limits.page_size, request.tokens
        node, pages = self._tree.match(tokens[: (len(tokens) - 1) // size * size], root)
        if self._windows is not None and (usable := self._windows.usable(pages)) < len(pages):
            return self._tree.match(tokens[: usable * size], root)
        return node, pages

    def _share(self, slot: int, end: int) -> None:
        """Give the tree the whole pages before token `end`, unless it has a copy by now; the slot keeps using them."""
        s, size, shared = self._slots, self._limits.page_size, int(self._slots.num_shared_pages[slot])
        full = min(end, int(s.num_known[slot])) // size
        if not self._limits.enable_prefix_caching or full <= shared or s.num_freed_pages[slot]:
            return
        tree, tokens, above = self._tree, s.tokens[slot, shared * size : full * size], s.prefix_nodes[slot]
        pages = tree.match(tokens, above)[1]
        if len(pages) == 0:
            pages = s.page_table[slot, shared:full]
            node, _ = tree.insert(tokens, pages, above)
            tree.lock(node)
            tree.unlock(above)
            s.prefix_nodes[slot] = node
            s.num_shared_pages[slot] = full
        if self._windows is not None:
            self._windows.share(slot, shared, pages)

    def _first_seen_pages(self, window: int) -> np.ndarray:
        """Return the first page that the next token of each running request sees, [R] int32."""
        first_seen = np.maximum(self._slots.num_computed[self._slots.running] + 1 - window, 0)
        pages: np.ndarray = first_seen // self._limits.page_size
        return pages

    def _free_unseen(self, slot: int, end: int) -> None:
        """Free the pages of a slot before page `end`, unless another request uses them."""
        s, tree = self._slots, self._tree
        while s.num_shared_pages[slot] > end:  # the slot sees a part of what it shares with the tree
            node = s.prefix_nodes[slot]
            if node.children:
                self._pool.release(tree.evict(tree.num_evictable))
            taken = tree.take_back(node)
            if len(taken) == 0:
                return
            assert node.parent is not None
            s.prefix_nodes[slot] = node.parent
            s.num_shared_pages[slot] -= len(taken)
        tree.unlock(s.prefix_nodes[slot])
        s.prefix_nodes[slot] = tree.root
        tree.lock(tree.root)
        self._pool.release(s.page_table[slot, s.num_shared_pages[slot] : end].copy())
        s.num_shared_pages[slot] = s.num_freed_pages[slot] = end
