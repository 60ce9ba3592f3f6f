"""The scheduler against a simulated rank, under random operations.

The rank sees StepPlans only. For every place in the KV cache it keeps a hash of the whole token prefix that was last
written there. A row may compute only if each earlier position has the row's prefix in the place that its page table
names. Sharing, eviction, preemption and cancellation are thus tested on content. The sampled token is a hash of (seed,
position, prefix), so that a request has one correct output in any batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from lockstep.runtime.limits import Limits
from lockstep.runtime.plan import RequestEnd, StepPlan
from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.scheduler.prefix_cache import Node, PrefixCache
from lockstep.runtime.scheduler.scheduled_step import ScheduledStep
from lockstep.runtime.scheduler.scheduler import Scheduler
from lockstep.runtime.scheduler.window_pages import BlockPool

VOCAB = 7
MASK = 2**62 - 1


def extend(prefix: int, token: int) -> int:
    """Return the hash of a prefix extended by one token."""
    x = (prefix ^ (token + 1)) * 0x9E3779B97F4A7C15
    return (x ^ x >> 29) & MASK


def sample(seed: int, position: int, prefix: int) -> int:
    return extend(extend(prefix, seed), position) % VOCAB


def alone(request: Request, limits: Limits) -> tuple[list[int], str, int | None]:
    """Return the output of `request` when nothing else runs: tokens, finish reason, stop id."""
    tokens, prefix = request.tokens.tolist(), 0
    for token in tokens:
        prefix = extend(prefix, token)
    output: list[int] = []
    while True:
        token = sample(request.params.seed or 0, len(tokens) + len(output), prefix)
        prefix = extend(prefix, token)
        output.append(token)
        if token in request.stop_ids and len(output) > request.params.min_tokens:
            return output, "stop", token
        if len(output) == request.params.max_tokens or len(tokens) + len(output) == limits.max_length:
            return output, "length", None


class Rank:
    """A simulated follower: its state follows from the plans alone."""

    def __init__(self, limits: Limits) -> None:
        self.size = limits.page_size
        # Of each page table: the keys that a query sees.
        self.windows = [limits.window or limits.max_length] + [limits.group_window] * limits.num_window_groups
        tables = limits.num_tables, limits.max_num_seqs, -(-limits.max_length // self.size)
        self.page_tables = np.full(tables, -1)
        # Hash of the prefix that ends here, and of the group of layers.
        self.content = np.zeros((limits.num_pages, self.size), np.int64)
        self.prefix = np.zeros((limits.max_num_seqs, limits.max_length), np.int64)  # hash up to each position
        self.length = np.zeros(limits.max_num_seqs, np.int64)
        self.seed = np.zeros(limits.max_num_seqs, np.int64)
        self.step = 0

    def execute(self, plan: StepPlan) -> np.ndarray:
        """Return the sampled tokens [S] int32; fail if a row would read KV of another prefix."""
        assert plan.step == self.step
        self.step += 1
        for admission in plan.admitted:
            self.length[admission.slot], self.seed[admission.slot] = 0, admission.params.seed
            for token in admission.tokens.tolist():
                self.append(admission.slot, token)
        writes = plan.page_writes.reshape(-1, 2 + len(self.page_tables)).tolist()
        assert len({(slot, index) for slot, index, *_ in writes}) == len(writes)  # so their order has no meaning
        for slot, index, *pages in writes:
            self.page_tables[:, slot, index] = pages
        rows = list(zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True))
        assert len({slot for slot, _, _ in rows}) == len(rows)
        decoding, longer = rows[: plan.num_decoding], rows[plan.num_decoding :]
        assert plan.is_decode_only == (not longer)
        for slot, start, count in decoding:  # in any order, so all read before any writes
            assert count == 1
            self.read(slot, start, start + 1)
        for slot, start, count in rows:  # and then all others write before any of them reads
            assert count >= 1
            assert start + count <= self.length[slot]
            positions = np.arange(start, start + count)
            for group in range(len(self.windows)):
                self.content[self.places(group, slot, positions)] = self.prefix[slot, positions] + group
        for slot, start, count in longer:
            self.read(slot, start + count, start + 1)
        at_end = [row for row, (slot, start, count) in enumerate(rows) if start + count == self.length[slot]]
        assert plan.sampled_rows.tolist() == at_end
        assert at_end[: plan.num_decoding] == list(range(plan.num_decoding))  # every decoding row samples
        return np.array([self.sample(rows[row][0]) for row in at_end], np.int32)

    def read(self, slot: int, length: int, end: int) -> None:
        """Read the keys before `length` that the query before position `end` sees in each group of layers."""
        for group, window in enumerate(self.windows):
            positions = np.arange(max(end - window, 0), length)
            assert (self.content[self.places(group, slot, positions)] == self.prefix[slot, positions] + group).all()

    def places(self, group: int, slot: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.page_tables[group, slot, positions // self.size], positions % self.size

    def sample(self, slot: int) -> int:
        length = int(self.length[slot])
        token = sample(int(self.seed[slot]), length, int(self.prefix[slot, length - 1]))
        self.append(slot, token)
        return token

    def append(self, slot: int, token: int) -> None:
        length = int(self.length[slot])
        self.prefix[slot, length] = extend(int(self.prefix[slot, length - 1]) if length else 0, token)
        self.length[slot] += 1


@dataclass
class Ledger:
    """The front end's record of one request."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finished: list[RequestEnd] = field(default_factory=list)
    first_start: int | None = None  # where its very first step began
    cached: list[int] = field(default_factory=list)


class Simulation:
    """Front end, scheduler and rank; `check` tests all invariants."""

    def __init__(self, limits: Limits, depth: int, num_clients: int = 0) -> None:
        self.limits, self.depth = limits, depth
        self.num_clients, self.rng = num_clients, random.Random(0)  # 0: requests without an origin, in order of arrival
        self.scheduler, self.rank = Scheduler(limits), Rank(limits)
        self.ledger: dict[int, Ledger] = {}
        self.in_flight: deque[tuple[ScheduledStep, np.ndarray]] = deque()
        self.num_steps = 0
        self.admitted: list[int] = []  # in order of first admission

    # -- operations

    def add(
        self, prompt: list[int], *, max_tokens: int = 4, min_tokens: int = 0, stop_ids: list[int] | None = None
    ) -> int:
        uid = len(self.ledger)
        params = SamplingParams(max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), seed=uid % 3)
        origin = (self.rng.randint(1, self.num_clients), uid % 3) if self.num_clients else ()
        request = Request(uid, np.array(prompt, np.int32), len(prompt), params, stop_ids or [], *origin)
        self.scheduler.add(request)
        self.ledger[uid] = Ledger(request)
        return uid

    def cancel(self, uid: int) -> None:
        finished, entry = self.scheduler.cancel(uid), self.ledger[uid]
        assert (finished is None) == bool(entry.finished)
        if finished is not None:
            assert finished == RequestEnd(uid, "abort")
            entry.finished.append(finished)

    def schedule(self) -> bool:
        """Schedule a step and run it without committing its results; return False if there was nothing to compute."""
        s = self.scheduler.slots
        admission_ids, before = s.admission_id.copy(), s.num_computed.copy()
        decoding = [
            slot
            for slot in s.running
            if s.length[slot] == s.num_computed[slot] + 1 and s.length[slot] < s.max_length[slot]
        ]
        prompts = [slot for slot in s.running if s.length[slot] > s.num_computed[slot] + 1]
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            assert self.in_flight or not self.scheduler.has_work
            return False
        plan = scheduled.plan
        assert int(plan.counts.sum()) <= self.limits.max_num_batched_tokens
        older = s.running[:-1]
        in_progress = older[s.length[older] - s.num_computed[older] > 1]
        # One prompt in progress at a time, the newest, or one of each client.
        assert len(in_progress) == 0 or len(set(s.client[in_progress].tolist())) == len(in_progress) < self.num_clients
        for slot in decoding + prompts[:1]:
            preempted = s.admission_id[slot] != admission_ids[slot]
            is_computed = slot in plan.slots and s.num_computed[slot] > before[slot]
            assert preempted or is_computed or scheduled.is_limited
            assert not preempted or slot != s.running[0]
        for admission in plan.admitted:
            entry = self.ledger[self.uid_in(admission.slot)]
            if entry.first_start is None:
                entry.first_start = int(plan.starts[plan.slots == admission.slot][0])
                self.admitted.append(entry.request.uid)
        self.in_flight.append((scheduled, self.rank.execute(plan)))
        self.num_steps += 1
        return True

    def uid_in(self, slot: int) -> int:
        request = self.scheduler.slots.requests[slot]
        assert request is not None
        return request.uid

    def commit(self) -> None:
        """Commit the results of the oldest step in flight."""
        scheduled, tokens = self.in_flight.popleft()
        output = self.scheduler.commit(scheduled, tokens)
        self.check_free_pages(output.free_pages)
        if self.num_clients:
            seconds = self.rng.choice([0.001, 0.01, 0.1])
            num_tokens = int(scheduled.plan.counts.sum())
            self.scheduler.division.budget.note(num_tokens, seconds, seconds, is_limited=scheduled.is_limited)
        assert len(set(output.uids)) == len(output.uids)
        for uid, token in zip(output.uids, output.tokens, strict=True):
            assert not self.ledger[uid].finished
            self.ledger[uid].tokens.append(token)
        for finished in output.finished:
            self.ledger[finished.uid].finished.append(finished)
        for uid, cached in output.cached_tokens.items():
            self.ledger[uid].cached.append(cached)

    def check_free_pages(self, actual: int | None) -> None:
        """A running request has the pages that it shares, and of the others those with keys that it sees."""
        s, held = self.scheduler.slots, 0
        for slot in s.running.tolist():
            first = max(0, int(s.num_computed[slot]) + 1 - (self.limits.window or MASK)) // self.limits.page_size
            held += max(0, int(s.num_pages[slot]) - max(first, int(s.num_shared_pages[slot])))
        locked = self.scheduler.pages.tree.num_pages - self.scheduler.pages.tree.num_evictable
        assert actual == self.limits.num_pages - locked - held - self.limits.num_window_groups * len(self.held_blocks())

    def held_blocks(self) -> Counter[int]:
        """Return the slots that hold each block."""
        s, windows = self.scheduler.slots, self.scheduler._slot_pages._windows
        held: Counter[int] = Counter()
        for slot in s.running.tolist() if windows is not None else ():
            held.update(windows._table[slot, s.num_unseen_pages[slot] : s.num_pages[slot]].tolist())
        return held

    def check_blocks(self) -> list[int]:
        """Check who has each block, and that it has the content of its page of the tree; return the pages of all."""
        pool, tree_pages = self.scheduler.pages, [page for node in self.nodes() for page in node.pages.tolist()]
        if not isinstance(pool, BlockPool):
            return []
        held = self.held_blocks()
        cached = {int(pool._block_of[page]): page for page in tree_pages if pool._block_of[page] >= 0}
        assert (pool._block_of >= 0).sum() == (pool._page_of >= 0).sum() == len(cached)
        for block, page in cached.items():
            assert pool._page_of[block] == page
            for group, window_page in enumerate(pool._pages[block].tolist(), start=1):
                assert (self.rank.content[window_page] == self.rank.content[page] + group).all()
        assert all(pool._num_users[block] == count for block, count in held.items())
        assert pool._num_users[list(cached.keys() - held.keys())].sum() == 0
        assert pool.num_idle == len(cached.keys() - held.keys())
        assert sum(len(pool._still_idle(number, old)) for _, number, old in pool._idle) == pool.num_idle
        return [page for block in cached.keys() | held.keys() for page in pool._pages[block].tolist()]

    def advance(self) -> None:
        """Do the next step of an engine: fill the pipeline, else commit the oldest results."""
        if (len(self.in_flight) == self.depth or not self.schedule()) and self.in_flight:
            self.commit()

    def finish(self) -> None:
        """Run all requests to their end, and check their outputs."""
        lengths = [len(e.request.tokens) + len(alone(e.request, self.limits)[0]) for e in self.ledger.values()]
        while self.scheduler.has_work or self.in_flight:
            self.advance()
            self.check()
            # The oldest request advances in each step, but for the steps that wait for its last results.
            # Clients share the tokens of a step, and preempt each other's requests.
            most = sum(lengths) + self.depth * len(lengths)
            assert self.num_steps <= (4 * most if self.num_clients else most)
        for entry in self.ledger.values():
            self.check_delivered(entry)
        assert self.scheduler.pages.num_available == self.limits.num_pages
        assert all(node.locks == 0 for node in [self.scheduler.pages.tree.root, *self.nodes()])

    # -- what must hold

    def check_delivered(self, entry: Ledger) -> None:
        tokens, reason, stop_id = alone(entry.request, self.limits)
        (finished,) = entry.finished
        if finished.reason == "abort":
            assert entry.tokens == tokens[: len(entry.tokens)]
            assert entry.cached in ([], [entry.first_start])
        else:
            assert (entry.tokens, finished.reason, finished.stop_id) == (tokens, reason, stop_id)
            assert entry.cached == [entry.first_start]

    def nodes(self) -> list[Node]:
        nodes = list(self.scheduler.pages.tree.root.children.values())
        for node in nodes:
            nodes.extend(node.children.values())
        return nodes

    def check_content(self, node: Node, prefix: int) -> None:
        """Check that every page below `node` holds the KV of its path in the tree."""
        for child in node.children.values():
            end, content = prefix, self.rank.content[child.pages].ravel().tolist()
            for token, actual in zip(child.tokens.tolist(), content, strict=True):
                end = extend(end, token)
                assert actual == end
            self.check_content(child, end)

    def check(self) -> None:
        s, pages, nodes = self.scheduler.slots, self.scheduler.pages, self.nodes()
        owned = pages._free[: pages.num_free].tolist() + [page for node in nodes for page in node.pages.tolist()]
        owned += self.check_blocks()
        locks: Counter[int] = Counter()
        for slot in s.running.tolist():
            shared, held = s.page_table[slot, : s.num_pages[slot]], int(s.num_shared_pages[slot])
            assert s.num_freed_pages[slot] in (0, held)
            owned += shared[held:].tolist()
            path: list[int] = []
            up: Node | None = s.prefix_nodes[slot]
            while up is not None:
                locks[id(up)] += 1
                path[:0] = up.pages.tolist()
                up = up.parent
            assert path == ([] if s.num_freed_pages[slot] else shared[:held].tolist())
        assert sorted(owned) == list(range(self.limits.num_pages))
        assert all(node.locks == locks[id(node)] for node in nodes)
        assert pages.tree.num_evictable == sum(len(node.pages) for node in nodes if not locks[id(node)])
        self.check_content(pages.tree.root, 0)
        running, waiting = (
            [self.uid_in(slot) for slot in s.running],
            [request.uid for request in self.scheduler.waiting],
        )
        if not self.num_clients:
            assert running + waiting == sorted(running + waiting)  # in order of arrival, through preemptions too
            assert self.admitted == sorted(self.admitted)
        assert self.scheduler._preempted <= set(waiting)  # ended requests are forgotten
        assert sorted(running + waiting) == [uid for uid, entry in self.ledger.items() if not entry.finished]


class SchedulerMachine(RuleBasedStateMachine):
    """Few slots and pages, so that a failure shrinks to a few operations."""

    @initialize(
        page_size=st.sampled_from([1, 3, 16]),
        depth=st.integers(1, 2),
        capacity=st.integers(16, 70),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(0, 30),
        caching=st.booleans(),
        num_clients=st.sampled_from([0, 3]),
        window=st.sampled_from([None, None, 1, 5, 20]),
        num_window_groups=st.sampled_from([0, 0, 1, 3]),
    )
    def start(
        self,
        page_size: int,
        depth: int,
        capacity: int,
        max_num_seqs: int,
        budget: int,
        caching: bool,
        num_clients: int,
        window: int | None,
        num_window_groups: int,
    ) -> None:
        groups = num_window_groups if window is not None else 0
        budget = min(budget, 8) if groups else budget  # so that a step leaves room for the prompt before it
        self.simulation = Simulation(
            limits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_seqs + budget,
                num_pages=max(-(-capacity // page_size), 2 * (1 + groups)),
                page_size=page_size,
                enable_prefix_caching=caching,
                window=None if groups else window,
                num_window_groups=groups,
                group_window=window or 0,
            ),
            depth,
            num_clients,
        )

    @rule(
        common=st.integers(0, 30),
        suffix=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 4),
        stop_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    )
    def add(self, common: int, suffix: list[int], max_tokens: int, min_tokens: int, stop_ids: list[int]) -> None:
        prompt = (FAMILY[:common] + suffix)[: self.simulation.limits.max_length - 1] or [0]
        self.simulation.add(prompt, max_tokens=max_tokens, min_tokens=min_tokens, stop_ids=stop_ids)

    @precondition(lambda self: self.simulation.ledger)
    @rule(number=st.integers(0, 99), suffix=st.lists(st.integers(0, VOCAB - 1), max_size=3))
    def ask_again(self, number: int, suffix: list[int]) -> None:
        """A conversation's next turn: a prompt and its output are the new prompt."""
        entry = self.simulation.ledger[number % len(self.simulation.ledger)]
        prompt = entry.request.tokens.tolist() + entry.tokens + suffix
        self.simulation.add(prompt[: self.simulation.limits.max_length - 1], max_tokens=3)

    @precondition(lambda self: self.simulation.ledger)
    @rule(number=st.integers(0, 99))
    def cancel(self, number: int) -> None:
        self.simulation.cancel(number % len(self.simulation.ledger))

    @rule(times=st.integers(1, 6))
    def advance(self, times: int) -> None:
        for _ in range(times):
            self.simulation.advance()
            self.simulation.check()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def commit(self) -> None:
        self.simulation.commit()

    @invariant()
    def holds(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish()


FAMILY = random.Random(0).choices(range(VOCAB), k=200)


def limits(
    *,
    max_model_len: int = 60,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    num_pages: int = 64,
    page_size: int = 1,
    enable_prefix_caching: bool = True,
    window: int | None = None,
    num_window_groups: int = 0,
    group_window: int = 0,
) -> Limits:
    return Limits(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_pages=num_pages,
        page_size=page_size,
        vocab_size=VOCAB,
        enable_prefix_caching=enable_prefix_caching,
        window=window,
        num_window_groups=num_window_groups,
        group_window=group_window,
    )


def test_scheduler_random_operations_with_few_pages() -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(stateful_step_count=30),
    )


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_scheduler_random_operations_with_full_cache(page_size: int, depth: int, caching: bool) -> None:
    """Hundreds of requests in a cache that is always full."""
    total: Counter[str] = Counter()
    num_seeds = max(4, settings().max_examples // 25)
    for seed in range(num_seeds):
        rng = random.Random(f"{seed} {page_size} {depth} {caching}")
        max_num_seqs = rng.randint(4, 12)
        world = limits(
            max_model_len=150,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 7, 20, 100]),
            num_pages=rng.choice([90, 120, 180]) // page_size,
            page_size=page_size,
            enable_prefix_caching=caching,
        )
        simulation = Simulation(world, depth, num_clients=seed % 2 * 4)
        for _ in range(700):
            operate(simulation, rng)
            simulation.check()
        simulation.finish()
        total["preempted"] += simulation.scheduler.num_preemptions
        total["cached"] += sum(map(sum, (entry.cached for entry in simulation.ledger.values())))
        total.update(finished.reason for entry in simulation.ledger.values() for finished in entry.finished)
    assert (total.pop("cached") > 0) == caching
    assert total.keys() == {"preempted", "stop", "length", "abort"}  # the pressure was there
    assert min(total.values()) >= 2 * num_seeds


def operate(simulation: Simulation, rng: random.Random) -> None:
    """One random operation; steps are the most frequent ones."""
    kind = rng.random()
    ledger, longest = simulation.ledger, simulation.limits.max_length - 1
    if kind < 0.25 and len(simulation.scheduler.waiting) < 8:
        prompt = FAMILY[: rng.choice([0, 5, 10, 20, 60])] + rng.choices(range(VOCAB), k=rng.choice([1, 2, 3, 20]))
        if ledger and rng.random() < 0.15:
            entry = rng.choice(list(ledger.values()))
            prompt = entry.request.tokens.tolist() + entry.tokens + [0]
        stop_ids = rng.sample(range(VOCAB), k=rng.choice([0, 0, 0, 1, 3]))
        simulation.add(
            prompt[:longest],
            max_tokens=rng.choice([1, 10, 80, 200]),
            min_tokens=rng.choice([0, 0, 3]),
            stop_ids=stop_ids,
        )
    elif kind < 0.26 and ledger:
        simulation.cancel(rng.choice(list(ledger)[-12:]))
    else:
        simulation.advance()


def cached_tokens(simulation: Simulation) -> list[int]:
    return [sum(entry.cached) for entry in simulation.ledger.values()]


def computed_tokens(simulation: Simulation) -> int:
    """Run everything to its end; how many tokens all the steps computed."""
    total = 0
    while simulation.scheduler.has_work or simulation.in_flight:
        if simulation.schedule():
            total += int(simulation.in_flight[-1][0].plan.counts.sum())
        while simulation.in_flight:
            simulation.commit()
    simulation.finish()
    return total


def test_prefix_of_equal_prompts_in_one_step_is_computed_once() -> None:
    simulation = Simulation(limits(max_num_batched_tokens=200, page_size=16, num_pages=20), depth=1)
    for _ in range(4):
        simulation.add(FAMILY[:50], max_tokens=1)
    assert computed_tokens(simulation) == 50 + 3 * 2
    assert cached_tokens(simulation) == [0, 48, 48, 48]


@pytest.mark.parametrize("budget", [20, 37, 50, 64])
def test_prefix_in_chunks_is_computed_once(budget: int) -> None:
    """Each request adds a page to a system prompt longer than the budget, which is computed once."""
    world = limits(max_model_len=200, max_num_batched_tokens=budget, page_size=16, num_pages=100)
    simulation = Simulation(world, depth=1)
    for suffix in range(4):
        simulation.add(FAMILY[:160] + [suffix] * 16, max_tokens=1)
    assert computed_tokens(simulation) == 160 + 4 * 16


def test_budget_excludes_cached_tokens() -> None:
    simulation = Simulation(limits(max_model_len=200, max_num_batched_tokens=16, page_size=1, num_pages=400), depth=1)
    simulation.add(FAMILY[:180], max_tokens=1)
    simulation.add(FAMILY[:181], max_tokens=1)
    simulation.finish()
    assert simulation.num_steps <= 180 // 16 + 2


def test_admission_continues_after_blocked_request_is_cancelled() -> None:
    simulation = Simulation(limits(num_pages=50), depth=1)
    simulation.add([0] * 30, max_tokens=9)
    large, small = simulation.add([1] * 40), simulation.add([2] * 5)
    simulation.advance()
    simulation.cancel(large)
    simulation.commit()
    simulation.schedule()
    assert simulation.admitted == [0, small]
    simulation.finish()


def test_admission_leaves_a_page_for_each_running_request() -> None:
    simulation = Simulation(limits(num_pages=20), depth=1)
    simulation.add([0] * 10, max_tokens=5)
    simulation.add([1] * 10, max_tokens=5)
    simulation.finish()
    assert simulation.scheduler.num_preemptions == 0


def test_blocked_request_is_not_matched_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(limits(num_pages=50), depth=1)
    tree, lookups = simulation.scheduler.pages.tree, []
    monkeypatch.setattr(tree, "match", lambda *arguments: lookups.append(1) or PrefixCache.match(tree, *arguments))
    simulation.add([0] * 30, max_tokens=15)
    simulation.add([1] * 40)
    for _ in range(4):
        simulation.advance()
    before = len(lookups)
    for _ in range(20):
        simulation.advance()
    assert len(lookups) == before
    simulation.finish()


@pytest.mark.parametrize(
    ("prompt", "num_pages", "message"),
    [
        ([], 8, "prompt is empty; give a text or at least one token id"),
        ([0] * 60, 64, r"60 tokens, but the context is 60 .* shorten the prompt or raise max_model_len"),
        ([0] * 32, 2, r"32 tokens, but the context is 32 .* raise num_pages or kv_cache_memory"),
        ([0, VOCAB], 8, "token id 7 in the prompt; the model has ids 0 to 6"),
        ([0, -1], 8, "token id -1 in the prompt; the model has ids 0 to 6"),
    ],
)
def test_request_that_can_never_run_is_refused(prompt: list[int], num_pages: int, message: str) -> None:
    simulation = Simulation(limits(num_pages=num_pages, page_size=16), depth=1)
    with pytest.raises(ValueError, match=message):
        simulation.add(prompt)
    assert not simulation.scheduler.has_work


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_requests_with_a_window_are_longer_than_the_cache(page_size: int) -> None:
    """Pages that no layer sees any more are freed while requests run, also those of a common prefix."""
    preempted = cached = 0
    for seed in range(4):
        rng = random.Random(f"{seed} {page_size}")
        world = limits(
            max_model_len=400,
            max_num_seqs=8,
            max_num_batched_tokens=12,
            num_pages=72 // page_size,
            page_size=page_size,
            window=rng.choice([16, 30]),
        )
        assert world.max_length == 400
        simulation = Simulation(world, depth=2, num_clients=seed % 2 * 3)
        for _ in range(400):
            operate(simulation, rng)
            simulation.check()
        simulation.add(FAMILY[:150], max_tokens=150)  # alone and with a long prompt
        simulation.finish()
        preempted += simulation.scheduler.num_preemptions
        cached += sum(cached_tokens(simulation))
    assert preempted > 0
    assert cached > 50


def test_prompts_with_a_salt_stay_apart_when_the_window_leaves_no_room_for_their_prefix() -> None:
    simulation = Simulation(limits(max_model_len=60, max_num_batched_tokens=8, num_pages=24, window=4), depth=1)
    tree = simulation.scheduler.pages.tree
    for length in (23, 50):  # the first fills the cache; the second cannot use it all and go on
        request = Request(length, np.array(FAMILY[:length], np.int32), length, SamplingParams(max_tokens=1, seed=0), [])
        simulation.scheduler.add(replace(request, cache_salt="secret"))
        simulation.ledger[length] = Ledger(request)
        while simulation.scheduler.has_work or simulation.in_flight:
            simulation.advance()
            assert not tree.root.children
    assert all(len(entry.tokens) == 1 for entry in simulation.ledger.values())


def test_window_frees_pages_only_when_they_are_needed() -> None:
    """A conversation whose beginning no layer sees any more is still a cached prefix of its next turn."""
    simulation = Simulation(limits(max_model_len=120, num_pages=64, page_size=2, window=6), depth=1)
    simulation.add(FAMILY[:30], max_tokens=50)
    simulation.finish()
    entry = simulation.ledger[0]
    turns = simulation.add([*FAMILY[:30], *entry.tokens, 0], max_tokens=1)
    simulation.finish()
    assert simulation.ledger[turns].cached == [78]
    simulation.add([1] * 40, max_tokens=79)  # takes pages of the conversation, and of its own beginning
    simulation.add([2] * 40, max_tokens=79)
    simulation.finish()
    assert simulation.scheduler.num_preemptions == 0


def test_longest_request_fills_the_whole_cache() -> None:
    simulation = Simulation(limits(max_model_len=48, num_pages=3, page_size=16), depth=2)
    simulation.add([0] * 47, max_tokens=500)
    simulation.add([1], max_tokens=500)
    simulation.finish()
    assert [len(entry.tokens) for entry in simulation.ledger.values()] == [1, 47]


@pytest.mark.parametrize(
    ("page_size", "num_window_groups"),
    [(3, 1), *(pytest.param(*case, marks=pytest.mark.nightly) for case in [(1, 1), (16, 1), (1, 3), (3, 3), (16, 3)])],
)
def test_random_operations_with_window_groups_and_a_full_cache(page_size: int, num_window_groups: int) -> None:
    """Layers with a window keep pages for it only, and a cached prefix is used where the pages seen are left."""
    preempted = cached = shortened = 0
    for seed in range(max(4, settings().max_examples // 25)):
        rng = random.Random(f"{seed} {page_size} {num_window_groups}")
        world = limits(
            max_model_len=150,
            max_num_seqs=8,
            max_num_batched_tokens=rng.choice([12, 40]),
            num_pages=(400 + 300 * num_window_groups) // page_size // 2,
            page_size=page_size,
            num_window_groups=num_window_groups,
            group_window=rng.choice([1, 16, 30]),
        )
        simulation = Simulation(world, depth=1 + seed % 2, num_clients=seed // 2 % 2 * 3)
        windows = simulation.scheduler._slot_pages._windows
        assert windows is not None
        lost: list[int] = []
        usable = windows.usable

        def count_lost(pages: np.ndarray, usable: Callable = usable, lost: list[int] = lost) -> int:
            count: int = usable(pages)
            lost.append(len(pages) - count)
            return count

        windows.usable = count_lost  # type: ignore[method-assign]
        for _ in range(300):
            operate(simulation, rng)
            simulation.check()
        simulation.finish()
        preempted += simulation.scheduler.num_preemptions
        cached += sum(cached_tokens(simulation))
        shortened += sum(count > 0 for count in lost)
    assert preempted > 0
    assert cached > 50
    assert shortened > 0


def test_window_groups_need_pages_for_their_window_only() -> None:
    """60 tokens in all layers would need 60 pages of each of 4 tables."""
    world = limits(
        max_model_len=60, max_num_batched_tokens=8, num_pages=60 + 3 * 13, num_window_groups=3, group_window=5
    )
    assert world.max_length == 60
    simulation = Simulation(world, depth=2)
    simulation.add(FAMILY[:40], max_tokens=20)
    simulation.finish()
    assert simulation.scheduler.num_preemptions == 0
    with pytest.raises(ValueError, match="raise num_pages or kv_cache_memory"):
        Simulation(dataclasses.replace(world, num_pages=60 + 3 * 13 - 1), depth=1).add(FAMILY[:59])


def test_prefix_without_the_pages_of_its_window_is_computed_again_and_then_complete() -> None:
    world = limits(max_model_len=60, num_pages=200, num_window_groups=1, group_window=8)
    simulation = Simulation(world, depth=1)
    pool = simulation.scheduler.pages
    assert isinstance(pool, BlockPool)
    for expected in (0, 39, 36, 39):
        turn = simulation.add(FAMILY[:40], max_tokens=1)
        simulation.finish()
        assert simulation.ledger[turn].cached == [expected]
        if turn == 1:  # of the window before token 39, lose a page
            pages = pool.tree.match(np.array(FAMILY[:40], np.int32))[1]
            pool._give_up(pool.blocks_of(pages[36:37]))
            simulation.check()
