"""A client with little work beside one with much: the scheduler alone, with steps of an assumed duration.

A step takes a constant time and a time for each token. Four requests of six letters and a stream are the light client's
work, as in scripts/soak/soak_attacks.py. Their times beside a heavy client are compared with those without it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from lockstep.runtime.limits import Limits
from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.scheduler.scheduler import Scheduler
from lockstep.runtime.scheduler.step_budget import LEAST_TOKENS, SLOWDOWN, StepBudget
from lockstep.runtime.scheduler.step_division import ANONYMOUS, max_min_shares

LIGHT, HEAVY = 1, 2
STEP_S, TOKEN_S = 0.004, 0.0003
THINK_S = 0.02


@dataclass
class Call:
    """A call of the light client, or one of the heavy client's calls."""

    client: int
    num_prompts: int
    num_tokens: int
    params: dict[str, Any]
    sent: float = 0.0
    left: int = 0


@dataclass
class Clients:
    """Clients that send a call again when it has ended, over a scheduler with a clock."""

    limits: Limits
    is_fair: bool = True
    now: float = 0.0
    latencies: list[float] = field(default_factory=list)  # of the light client's short calls
    num_steps: Counter[int] = field(default_factory=Counter)  # that had tokens of a client
    num_tokens: Counter[int] = field(default_factory=Counter)  # computed for a client

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self._uids, self._rng = itertools.count(), np.random.default_rng(0)
        self._calls: dict[int, Call] = {}  # by uid
        self._later: list[tuple[float, Call]] = []

    def send(self, call: Call) -> None:
        call.sent, call.left, number = self.now, call.num_prompts, next(self._uids)
        for _ in range(call.num_prompts):
            uid = next(self._uids)
            self._calls[uid] = call
            tokens = self._rng.integers(10, size=call.num_tokens, dtype=np.int32)
            origin = (call.client, number) if self.is_fair else (ANONYMOUS, 0)
            params = SamplingParams(seed=1, **call.params)
            self.scheduler.add(Request(uid, tokens, len(tokens), params, [], *origin))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            for entry in [entry for entry in self._later if entry[0] <= self.now]:
                self._later.remove(entry)
                self.send(entry[1])
            self._step()

    def _step(self) -> None:
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            self.now += 0.001
            return
        plan = scheduled.plan
        clients = [self._calls[int(uid)].client for uid in self.scheduler.slots.uid[plan.slots]]
        self.num_steps.update(set(clients))
        for client, count in zip(clients, plan.counts.tolist(), strict=True):
            self.num_tokens[client] += count
        seconds = STEP_S + TOKEN_S * int(plan.counts.sum())
        self.now += seconds
        output = self.scheduler.commit(scheduled, np.ones(len(scheduled.slots), np.int32))
        num_tokens = int(plan.counts.sum())
        self.scheduler.division.budget.note(num_tokens, seconds, seconds, is_limited=scheduled.is_limited)
        for end in output.finished:
            self._end(self._calls.pop(end.uid))

    def _end(self, call: Call) -> None:
        call.left -= 1
        if call.left == 0:
            is_short = call.client == LIGHT and call.params["max_tokens"] == 4
            if is_short:
                self.latencies.append(self.now - call.sent)
            self._later.append((self.now + (THINK_S if is_short else 0), call))


def limits(*, max_num_batched_tokens: int = 8192, num_pages: int = 8192) -> Limits:
    return Limits(
        max_model_len=2048,
        max_num_seqs=256,
        max_num_batched_tokens=max_num_batched_tokens,
        num_pages=num_pages,
        page_size=16,
        vocab_size=10,
    )


def clients(*heavy: Call, is_fair: bool = True) -> Clients:
    """Return clients of which the light one has sent its calls for a while, and the heavy one begins."""
    result = Clients(limits(), is_fair)
    result.send(Call(LIGHT, 1, 6, {"max_tokens": 200}))
    for _ in range(4):
        result.send(Call(LIGHT, 1, 6, {"max_tokens": 4}))
    result.run(0.3)
    result.latencies.clear()
    for call in heavy:
        result.send(call)
    return result


def slowest(result: Clients) -> float:
    """Return the 99th percentile of the short calls' latencies."""
    ordered = sorted(result.latencies)
    return ordered[int(0.99 * len(ordered))]


HEAVY_CALLS = {
    "long prompts": [Call(HEAVY, 128, 1900, {"max_tokens": 1}) for _ in range(8)],
    "echo": [Call(HEAVY, 8, 1900, {"max_tokens": 1, "prompt_logprobs": 20}) for _ in range(8)],
    "many outputs": [Call(HEAVY, 512, 1, {"max_tokens": 1000}) for _ in range(2)],
}


@pytest.mark.parametrize("kind", HEAVY_CALLS)
def test_light_client_is_slowed_down_three_times_at_most(kind: str) -> None:
    calm = clients()
    calm.run(1.0)
    beside = clients(*HEAVY_CALLS[kind])
    beside.run(2.0)
    assert slowest(beside) < 3 * slowest(calm)
    assert beside.num_tokens[HEAVY] > beside.num_tokens[LIGHT]  # which still gets most of the work done
    fcfs = clients(*HEAVY_CALLS[kind], is_fair=False)
    fcfs.run(2.0)
    assert len(fcfs.latencies) < len(beside.latencies) / 10  # the test can fail


def test_light_client_gets_pages_and_slots_of_a_client_with_all_of_them() -> None:
    calm = clients()
    calm.run(1.0)
    full = Clients(limits(num_pages=600))
    for _ in range(8):
        full.send(Call(HEAVY, 32, 300, {"max_tokens": 1700}))
    full.run(5.0)
    assert full.scheduler.pages.num_available < 30
    before = full.scheduler.num_preemptions
    for _ in range(5):
        full.send(Call(LIGHT, 1, 40, {"max_tokens": 4}))
    full.run(1.0)
    assert full.scheduler.num_preemptions > before
    assert len(full.latencies) > 30
    assert slowest(full) < 5 * slowest(calm)


def test_client_alone_computes_as_much_as_without_fairness() -> None:
    """After the first steps, whose durations are not known."""
    steps = []
    for is_fair in (True, False):
        alone = Clients(limits(max_num_batched_tokens=512), is_fair)
        for _ in range(100):
            alone.send(Call(HEAVY, 1, 200, {"max_tokens": 20}))
        while alone.num_tokens[HEAVY] < 60_000:
            alone.run(0.1)
        steps.append(alone.num_steps[HEAVY])
    assert steps[0] <= steps[1] + 5


def test_clients_with_equal_work_get_equal_shares() -> None:
    result = clients()
    for client in (3, 4, 5):
        result.send(Call(client, 10 * client, 1000, {"max_tokens": 50}))
    result.run(2.0)
    shares = [result.num_tokens[client] for client in (3, 4, 5)]
    assert max(shares) < 1.2 * min(shares)


def test_max_min_shares_against_filling_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        demands = dict(enumerate(rng.integers(0, 20, size=rng.integers(1, 8)).tolist()))
        total = int(rng.integers(len(demands), 60))
        filled = dict.fromkeys(demands, 0)
        for _ in range(total):
            hungry = [client for client in demands if filled[client] < demands[client]]
            if hungry:
                filled[min(hungry, key=lambda client: filled[client])] += 1
        shares = max_min_shares(demands, total)
        assert sorted(shares.values()) == sorted(filled.values())
        assert all(shares[client] <= demands[client] for client in demands)


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_budget_finds_the_tokens_of_three_light_steps(factor: float) -> None:
    """Within a fifth, whatever the duration of a token, after ten steps; but not less than the least."""
    budget = StepBudget(8192)
    light_s, token_s = 0.004, 0.00001 * factor
    for _ in range(50):
        budget.note(1, light_s, light_s, is_limited=False)
    durations = []
    for _ in range(20):
        num_tokens = budget.limit(num_clients=2)
        durations.append(light_s + num_tokens * token_s)
        budget.note(num_tokens, durations[-1], durations[-1], is_limited=True)
    assert 0.8 * SLOWDOWN * light_s < durations[-1] < 1.2 * SLOWDOWN * light_s or num_tokens == LEAST_TOKENS
    assert max(durations) < 2.5 * SLOWDOWN * light_s
