"""The prefix tree against a dict of page-aligned prefixes, under random operations; its cost is counted, not timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lockstep.kernels import ops, reference
from lockstep.runtime.scheduler.prefix_cache import Node, PagePool, PrefixCache

Prefix = tuple[int, ...]
SETTINGS = settings(stateful_step_count=50)


def walk(cache: PrefixCache) -> list[Node]:
    """Every node but the root."""
    nodes = list(cache.root.children.values())
    for node in nodes:
        nodes.extend(node.children.values())
    return nodes


def spelled(node: Node) -> Prefix:
    """The tokens on the path from the root to the end of `node`."""
    path: list[int] = []
    up: Node | None = node
    while up is not None:
        path[:0] = up.tokens.tolist()
        up = up.parent
    return tuple(path)


class Model:
    """The reference of the tree: one page at a time, by exhaustive search."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.locks: Counter[Prefix] = Counter()
        self.clock = 0

    def prefixes(self, tokens: Prefix) -> list[Prefix]:
        return [tokens[:n] for n in range(self.page_size, len(tokens) + 1, self.page_size)]

    def touch(self, prefixes: list[Prefix]) -> None:
        self.clock += 1
        self.used.update(dict.fromkeys(prefixes, self.clock))

    def match(self, tokens: Prefix, start: Prefix = ()) -> list[int]:
        actual = [p for p in self.prefixes(tokens) if len(p) > len(start) and p in self.pages]
        self.touch(actual)
        return [self.pages[p] for p in actual]

    def insert(self, tokens: Prefix, pages: list[int], start: Prefix = ()) -> int:
        present = len(self.match(tokens, start))
        missing = self.prefixes(tokens)[len(start) // self.page_size + present :]
        self.pages.update(zip(missing, pages[present:], strict=True))
        self.used.update(dict.fromkeys(missing, self.clock))
        return present

    def lock(self, tokens: Prefix) -> None:
        self.locks.update(self.prefixes(tokens))

    def unlock(self, tokens: Prefix) -> None:
        self.locks.subtract(self.prefixes(tokens))
        self.touch(self.prefixes(tokens))

    @property
    def evictable(self) -> list[Prefix]:
        return [p for p in self.pages if self.locks[p] == 0]

    def evict(self, n: int) -> set[int]:
        freed = set()
        for _ in range(n):
            parents = {p[: -self.page_size] for p in self.pages}
            victim = min((p for p in self.evictable if p not in parents), key=self.used.__getitem__)
            freed.add(self.pages.pop(victim))
        return freed


class RadixMachine(RuleBasedStateMachine):
    """Both side by side. Pages of tokens differ in their last token only, the hardest case for a wrong key."""

    page_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.page_size)
        self.model = Model(self.page_size)
        self.next_page = 0
        self.locked: list[tuple[Node, Prefix]] = []

    def tokens(self, kinds: list[int], rest: int = 0) -> np.ndarray:
        pages = [[7] * (self.page_size - 1) + [kind] for kind in kinds]
        return np.array([t for page in pages for t in page] + [7] * (rest % self.page_size), np.int32)

    def new_pages(self, n: int) -> np.ndarray:
        self.next_page += n
        return np.arange(self.next_page - n, self.next_page, dtype=np.int32)

    kinds = st.lists(st.integers(0, 1), max_size=5)

    @initialize(sequences=st.lists(kinds, min_size=3, max_size=6))
    def fill(self, sequences: list[list[int]]) -> None:
        for kinds in sequences:
            self.insert(kinds)

    @rule(kinds=kinds, rest=st.integers(0, 15))
    def match(self, kinds: list[int], rest: int) -> None:
        tokens = self.tokens(kinds, rest)
        node, pages = self.cache.match(tokens)
        assert pages.tolist() == self.model.match(tuple(tokens.tolist()))
        assert spelled(node) == tuple(tokens[: len(pages) * self.page_size].tolist())

    @rule(kinds=kinds)
    def insert(self, kinds: list[int]) -> None:
        tokens, pages = self.tokens(kinds), self.new_pages(len(kinds))
        node, present = self.cache.insert(tokens, pages)
        assert present == self.model.insert(tuple(tokens.tolist()), pages.tolist())
        assert spelled(node) == tuple(tokens.tolist())
        tokens[:], pages[:] = -1, -1  # the caller may reuse its arrays

    @rule(kinds=kinds, rest=st.integers(0, 15))
    def lock(self, kinds: list[int], rest: int) -> None:
        tokens = self.tokens(kinds, rest)
        node, pages = self.cache.match(tokens)
        self.model.match(tuple(tokens.tolist()))
        self.cache.lock(node)
        prefix = tuple(tokens[: len(pages) * self.page_size].tolist())
        self.model.lock(prefix)
        self.locked.append((node, prefix))

    @precondition(lambda self: self.locked)
    @rule(which=st.integers(0, 99))
    def unlock(self, which: int) -> None:
        node, prefix = self.locked.pop(which % len(self.locked))
        self.cache.unlock(node)
        self.model.unlock(prefix)

    @precondition(lambda self: self.locked)
    @rule(which=st.integers(0, 99), kinds=kinds, rest=st.integers(0, 15))
    def match_below(self, which: int, kinds: list[int], rest: int) -> None:
        start, prefix = self.locked[which % len(self.locked)]
        tokens = self.tokens(kinds, rest)
        node, pages = self.cache.match(tokens, start)
        assert pages.tolist() == self.model.match(prefix + tuple(tokens.tolist()), prefix)
        assert spelled(node) == prefix + tuple(tokens[: len(pages) * self.page_size].tolist())

    @precondition(lambda self: self.locked)
    @rule(which=st.integers(0, 99), kinds=kinds)
    def insert_below(self, which: int, kinds: list[int]) -> None:
        start, prefix = self.locked[which % len(self.locked)]
        tokens, pages = self.tokens(kinds), self.new_pages(len(kinds))
        node, present = self.cache.insert(tokens, pages, start)
        assert present == self.model.insert(prefix + tuple(tokens.tolist()), pages.tolist(), prefix)
        assert spelled(node) == prefix + tuple(tokens.tolist())

    @rule(n=st.integers(1, 6))
    def evict(self, n: int) -> None:
        n = min(n, self.cache.num_evictable)
        evicted = self.cache.evict(n).tolist()
        assert len(evicted) == n
        assert set(evicted) == self.model.evict(n)  # locked pages, and what is above others, are never in here

    @invariant()
    def counts_are_a_recount(self) -> None:
        nodes = walk(self.cache)
        assert self.cache.num_pages == sum(len(n.pages) for n in nodes) == len(self.model.pages)
        assert self.cache.num_evictable == sum(len(n.pages) for n in nodes if not n.locks) == len(self.model.evictable)

    @invariant()
    def the_tree_is_well_formed(self) -> None:
        held: Counter[int] = Counter()
        for node, _ in self.locked:
            up: Node | None = node
            while up is not None:
                held[id(up)] += 1
                up = up.parent
        for node in walk(self.cache):
            assert len(node.tokens) == len(node.pages) * self.page_size > 0
            assert node.parent is not None
            assert node.parent.children[node.tokens[: self.page_size].tobytes()] is node
            assert node.locks == held[id(node)]
            ends = range(len(node.pages) * self.page_size, 0, -self.page_size)
            path = spelled(node)
            above = len(path) - len(node.tokens)
            assert [self.model.pages[path[: above + end]] for end in ends] == node.pages[::-1].tolist()


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_tree_matches_brute_force(page_size: int) -> None:
    machine = type("Machine", (RadixMachine,), {"page_size": page_size})
    run_state_machine_as_test(machine, settings=SETTINGS)


def lines_run(work: Callable[[], Any]) -> int:
    """Lines of Python that `work` runs: a measure of its cost that no busy machine changes."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def wide_tree(num_leaves: int) -> PrefixCache:
    """Leaves of two pages each, all below one page."""
    cache = PrefixCache(page_size=1)
    for leaf in range(num_leaves):
        cache.insert(np.array([0, leaf, leaf], np.int32), np.arange(3, dtype=np.int32) + 3 * leaf)
    return cache


def test_eviction_cost_is_independent_of_tree_size() -> None:
    small, large = wide_tree(200), wide_tree(6400)
    assert lines_run(lambda: large.evict(100)) <= 1.1 * lines_run(lambda: small.evict(100))


def test_stale_heap_entries_cost_a_constant_per_use() -> None:
    """Uses leave stale entries behind: to meet them must cost at most in proportion to the uses."""
    cache = wide_tree(1000)
    uses = 5000
    tokens = np.array([0, 1, 1], np.int32)
    cost = lines_run(lambda: [cache.match(tokens) for _ in range(uses)] and cache.evict(1500))
    assert cost <= 60 * (uses + 1500)


def test_stale_heap_entries_do_not_accumulate_without_eviction() -> None:
    cache = wide_tree(100)
    tokens = np.array([0, 5, 5], np.int32)
    for _ in range(20_000):
        node, _ = cache.match(tokens)
        cache.lock(node)
        cache.unlock(node)
    assert len(cache._leaves) <= 2 * 100 + 1024


def test_evicted_node_is_not_evicted_again() -> None:
    """The second insert uses the first leaf, then makes it an inner node that becomes a leaf again later."""
    cache = PrefixCache(page_size=1)
    for number, tokens in enumerate(([1], [1, 2], [3])):
        cache.insert(np.array(tokens, np.int32), np.array([0, number][-len(tokens) :], np.int32))
    assert cache.evict(3).tolist() == [1, 0, 2]


def test_allocated_pages_do_not_change_when_others_are_released() -> None:
    pool = PagePool(num_pages=4, page_size=1)
    first, second = pool.allocate(2), pool.allocate(2)
    before = second.tolist()
    pool.release(first)
    assert second.tolist() == before


def test_unlock_counts_as_use() -> None:
    cache = PrefixCache(page_size=1)
    first, _ = cache.insert(np.array([1], np.int32), np.array([1], np.int32))
    cache.lock(first)
    cache.insert(np.array([2], np.int32), np.array([2], np.int32))
    cache.unlock(first)
    assert cache.evict(2).tolist() == [2, 1]


def test_split_node_does_not_keep_its_old_arrays_alive() -> None:
    cache = PrefixCache(page_size=1)
    cache.insert(np.arange(10_000, dtype=np.int32), np.arange(10_000, dtype=np.int32))
    cache.match(np.arange(5, dtype=np.int32))
    cache.evict(9_995)
    (kept,) = walk(cache)
    assert len(kept.tokens) == 5
    assert kept.tokens.base is None
    assert kept.pages.base is None


def test_deep_path_is_evicted_from_its_end() -> None:
    cache = PrefixCache(page_size=2)
    node = cache.root
    for turn in range(50):
        node, _ = cache.insert(np.array([turn, turn], np.int32), np.array([turn], np.int32), node)
        cache.lock(node)
    for turn in range(50):
        cache.unlock(walk(cache)[turn])
    assert [int(cache.evict(1)[0]) for _ in range(50)] == list(range(49, -1, -1))


def test_pool_allocates_free_pages_then_cached_never_locked() -> None:
    pool = PagePool(num_pages=8, page_size=1)
    mine = pool.allocate(6)
    node, _ = pool.tree.insert(np.array([1, 2, 3], np.int32), mine[:3])
    pool.tree.insert(np.array([9, 8, 7], np.int32), mine[3:])
    pool.tree.lock(node)
    assert pool.num_available == 8 - 3
    assert sorted([*pool.allocate(2), *mine]) == list(range(8))
    pool.release(np.array([6], np.int32))
    assert sorted(pool.allocate(2)) == [mine[5], 6]  # one free page and one evicted, the end of its sequence
    assert pool.tree.num_evictable == 2
    assert sorted(pool.allocate(2)) == sorted(mine[3:5])
    assert pool.num_available == 0
    assert pool.tree.match(np.array([1, 2, 3], np.int32))[1].tolist() == mine[:3].tolist()


@given(st.lists(st.integers(0, 1), max_size=80), st.integers(0, 80), st.integers(0, 20), st.integers(0, 15))
def test_common_prefix_length(tail: list[int], same: int, extra: int, offset: int) -> None:
    """Equal over `same` tokens, then different or at an end; `offset` breaks the alignment of the memory."""
    a = np.array([5] * offset + [3] * same + tail, np.int32)[offset:]
    b = np.array([3] * same + tail[: len(tail) // 2] + [-2] * extra, np.int32)
    expected = same + len(tail) // 2
    assert ops.common_prefix_length(a, b) == reference.common_prefix_length(a, b) == expected
    assert ops.common_prefix_length(b, a) == expected


def test_common_prefix_length_sees_every_position() -> None:
    for n in range(70):
        for where in range(n):
            a = np.arange(n, dtype=np.int32)
            b = a.copy()
            b[where] ^= 1 << where % 31
            assert ops.common_prefix_length(a, b) == reference.common_prefix_length(a, b) == where
