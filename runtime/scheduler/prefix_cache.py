"""The pages of the KV cache, and the prefix cache: a radix tree of the cached token sequences, over whole pages.

Each page is free, or belongs to a request or to the tree. A node of the tree holds a run of tokens (a multiple of the
page size) and the pages with their KV. A path from the root is a cached sequence. A request locks the node at the end
of its shared prefix. Unlocked nodes can be evicted, leaves first, least recently used first. A radix tree over the
KV cache is SGLang's idea (Zheng et al., 2023, 2312.07104).

    root - [system prompt] -+- [question A] - [answer A]
                            +- [question B]

Prompts with a salt have a tree for each salt, which nobody can reach who does not know the salt.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from ...kernels import ops

NO_PAGES = np.empty(0, dtype=np.int32)


class Node:
    """A run of whole pages below `parent`; `locks` counts the requests that use it or a node below it."""

    __slots__ = ("children", "last_used", "locks", "pages", "parent", "state", "tokens")

    def __init__(self, tokens: np.ndarray, pages: np.ndarray, parent: Node | None) -> None:
        self.tokens = tokens  # [n * page_size] int32
        self.pages = pages  # [n] int32
        self.parent = parent
        self.children: dict[bytes, Node] = {}  # keyed by the bytes of their first page of tokens
        self.locks = 0
        self.last_used = 0
        self.state = -1  # the recurrent state at the end of the run, see SavedStates; negative: none


class PrefixCache:
    """The tree and the pages that it owns."""

    def __init__(self, page_size: int, on_cut: Callable[[Node], None] | None = None) -> None:
        self.page_size = page_size
        self._on_cut = on_cut  # called with a node that loses its end
        self.root = Node(NO_PAGES, NO_PAGES, None)
        self._salted: dict[str, Node] = {}  # roots of the prompts with a salt
        self._num_roots_kept = 0  # roots after the last clean-up
        self.num_pages = 0  # pages that the tree owns
        self.num_evictable = 0  # pages in unlocked nodes: leaves, and inner nodes that become leaves
        self._clock = 0  # logical time: eviction order must not depend on a wall clock
        # Heap of (last used, tie break, node); entries may be out of date.
        self._leaves: list[tuple[int, int, Node]] = []
        self._num_pushes = 0
        self._num_leaves_kept = 0  # length of the heap after its last clean-up

    def root_of(self, salt: str | None) -> Node:
        """Return the root of the sequences with this salt; lock it, or a node below it, before the next call."""
        if salt is None:
            return self.root
        if salt not in self._salted:
            if len(self._salted) > 2 * self._num_roots_kept + 64:
                self._salted = {s: root for s, root in self._salted.items() if root.children or root.locks}
                self._num_roots_kept = len(self._salted)
            self._salted[salt] = Node(NO_PAGES, NO_PAGES, None)
        return self._salted[salt]

    def match(self, tokens: np.ndarray, start: Node | None = None) -> tuple[Node, np.ndarray]:
        """Find the longest cached prefix of `tokens` below `start` (default: the root), in whole pages.

        Returns its last node and its pages [n] int32, n * page_size <= len(tokens). A node that matches in part is
        split, so that the returned node ends exactly there. Lock it before the next insertion or eviction.
        """
        node, matched = start or self.root, []
        self._clock += 1
        while (child := node.children.get(self._key(tokens))) is not None:
            n = ops.common_prefix_length(child.tokens, tokens) // self.page_size
            node = child if n == len(child.pages) else self._split(child, n)
            self._touch(node)
            matched.append(node.pages)
            if node is not child:
                break
            tokens = tokens[n * self.page_size :]
        return node, np.concatenate(matched) if matched else NO_PAGES

    def insert(self, tokens: np.ndarray, pages: np.ndarray, start: Node | None = None) -> tuple[Node, int]:
        """Add the sequence `tokens` (whole pages) below `start`; return its last node and n, its pages already cached.

        The tree owns pages[n:] from now on. pages[:n] are duplicates and still belong to the caller.
        """
        node, present = self.match(tokens, start)
        n = len(present)
        if n == len(pages):
            return node, n
        rest = tokens[n * self.page_size :].copy()
        leaf = Node(rest, pages[n:].copy(), node)
        node.children[self._key(rest)] = leaf
        self.num_pages += len(leaf.pages)
        self.num_evictable += len(leaf.pages)
        self._touch(leaf)
        return leaf, n

    def lock(self, node: Node) -> None:
        """Protect `node` and its ancestors from eviction until `unlock`."""
        up: Node | None = node
        while up is not None:
            if up.locks == 0:
                self.num_evictable -= len(up.pages)
            up.locks += 1
            up = up.parent

    def unlock(self, node: Node) -> None:
        """Remove one lock of `node` and its ancestors, and mark them as just used."""
        self._clock += 1
        up: Node | None = node
        while up is not None:
            assert up.locks > 0, "unlock without lock"
            up.locks -= 1
            if up.locks == 0:
                self.num_evictable += len(up.pages)
            self._touch(up)
            up = up.parent

    def take_back(self, node: Node) -> np.ndarray:
        """Remove `node` and return its pages, which the caller then owns; none if something else uses the node.

        The caller holds one lock of `node`, and keeps those of its ancestors.
        """
        if node.parent is None or node.locks > 1 or node.children:
            return NO_PAGES
        del node.parent.children[self._key(node.tokens)]
        self.num_pages -= len(node.pages)
        return node.pages

    @property
    def now(self) -> int:
        """The logical time."""
        return self._clock

    def oldest(self) -> Node | None:
        """Return the least recently used node that can be evicted."""
        while self._leaves:
            last_used, _, node = self._leaves[0]
            if node.last_used == last_used and self._is_evictable_leaf(node):
                return node
            heapq.heappop(self._leaves)  # out of date
        return None

    def evict(self, num_pages: int) -> np.ndarray:
        """Remove and return the least recently used pages, ends of sequences first; called by PagePool.allocate."""
        assert num_pages <= self.num_evictable, "evicting more than is evictable"
        freed: list[np.ndarray] = []
        while num_pages > 0 and (node := self.oldest()) is not None:
            freed.append(self.evict_end(node, num_pages))
            num_pages -= len(freed[-1])
        return np.concatenate(freed) if freed else NO_PAGES

    def evict_end(self, node: Node, num_pages: int) -> np.ndarray:
        """Remove and return up to `num_pages` pages from the end of a node that can be evicted."""
        n = min(num_pages, len(node.pages))
        pages = node.pages[len(node.pages) - n :]
        self._drop_tail(node, n)
        return pages

    def _drop_tail(self, node: Node, n: int) -> None:
        self.num_pages -= n
        self.num_evictable -= n
        if self._on_cut is not None:
            self._on_cut(node)
        keep = len(node.pages) - n
        if keep:
            node.pages, node.tokens = node.pages[:keep], node.tokens[: keep * self.page_size]
            self._push_if_evictable_leaf(node)
        else:
            parent = node.parent
            assert parent is not None
            del parent.children[self._key(node.tokens)]
            node.parent = None
            self._push_if_evictable_leaf(parent)

    def _split(self, node: Node, n: int) -> Node:
        """Split `node` after n pages and return the upper part. Both copy: a view would keep the whole array alive."""
        end = n * self.page_size
        upper = Node(node.tokens[:end].copy(), node.pages[:n].copy(), node.parent)
        upper.locks, upper.last_used = node.locks, node.last_used  # a lock still protects the whole path
        assert node.parent is not None
        node.parent.children[self._key(upper.tokens)] = upper
        node.tokens, node.pages, node.parent = node.tokens[end:].copy(), node.pages[n:].copy(), upper
        upper.children[self._key(node.tokens)] = node
        return upper

    def _touch(self, node: Node) -> None:
        node.last_used = self._clock
        self._push_if_evictable_leaf(node)

    def _push_if_evictable_leaf(self, node: Node) -> None:
        if self._is_evictable_leaf(node):
            self._num_pushes += 1
            heapq.heappush(self._leaves, (node.last_used, self._num_pushes, node))
            # Each use of a leaf leaves an outdated entry, and without eviction they would accumulate.
            if len(self._leaves) > 2 * self._num_leaves_kept + 1024:
                self._leaves = [e for e in self._leaves if e[2].last_used == e[0] and self._is_evictable_leaf(e[2])]
                heapq.heapify(self._leaves)
                self._num_leaves_kept = len(self._leaves)

    def _is_evictable_leaf(self, node: Node) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None

    def _key(self, tokens: np.ndarray) -> bytes:
        """Return the key of the child for `tokens`; a run shorter than a page gives a key that no child has."""
        return tokens[: self.page_size].tobytes()


class PagePool:
    """Page numbers without memory; evicts pages from the prefix cache when none is free."""

    def __init__(self, num_pages: int, page_size: int, on_cut: Callable[[Node], None] | None = None) -> None:
        self.num_pages = num_pages
        self.tree = PrefixCache(page_size, on_cut)
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
            self._make_free(n - self.num_free)
        self.num_free -= n
        pages: np.ndarray = self._free[self.num_free : self.num_free + n].copy()
        return pages

    def _make_free(self, n: int) -> None:
        self.release(self.tree.evict(n))

    def release(self, pages: np.ndarray) -> None:
        """Free pages."""
        assert self.num_free + len(pages) <= self.num_pages, "a page was released twice"
        self._free[self.num_free : self.num_free + len(pages)] = pages
        self.num_free += len(pages)
