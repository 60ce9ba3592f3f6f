"""The order of waiting requests, against the order of arrival and the fairness bound of start-time fair queueing."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.scheduler.waiting_queue import VirtualTime, WaitingQueue


def request(uid: int, num_tokens: int = 1, client: int = 0, call: int = 0, priority: int = 0) -> Request:
    return Request(uid, np.zeros(num_tokens, np.int32), num_tokens, SamplingParams(), [], client, call, priority)


def pop(queue: WaitingQueue) -> Request:
    head = queue.head()
    assert head is not None
    return queue.pop(head.client)


def drain(queue: WaitingQueue) -> list[int]:
    uids = []
    while (head := queue.head()) is not None:
        assert queue.pop(head.client) is head
        uids.append(head.uid)
    assert len(queue) == 0
    return uids


@pytest.mark.parametrize("has_calls", [False, True])
def test_order_of_one_client_is_that_of_arrival_with_preempted_requests_first(has_calls: bool) -> None:
    queue, rng, expected = WaitingQueue(), random.Random(0), list(range(40))
    requests = [request(uid, rng.randint(1, 50), call=uid if has_calls else 0) for uid in expected]
    for item in requests[:30]:
        queue.add(item)
    preempted = [pop(queue) for _ in range(7)]
    for item in requests[30:]:
        queue.add(item)
    for item in reversed(preempted):  # the newest is preempted first
        queue.add(item, is_new=False)
    assert [item.uid for item in queue] == expected
    removed = rng.sample(expected, 9)
    for uid in removed:
        assert queue.remove(uid) is not None
        assert queue.remove(uid) is None
    assert drain(queue) == [uid for uid in expected if uid not in removed]


def test_removed_requests_leave_nothing_behind() -> None:
    queue = WaitingQueue()
    queue.add(request(0))
    for uid in range(1, 1000):
        queue.add(request(uid))
        assert queue.remove(uid) is not None
    assert len(queue.clients[0]._entries) < 5
    assert [item.uid for item in queue] == [0]
    assert drain(queue) == [0]


@pytest.mark.parametrize("flow", ["client", "call"])
def test_service_of_waiting_flows_differs_by_two_requests_at_most(flow: str) -> None:
    """Goyal et al., theorem 1: over any time in which both wait, by the sum of their longest requests."""
    for seed in range(20):
        queue, rng = WaitingQueue(), random.Random(seed)
        longest = {number: rng.choice([1, 10, 100]) for number in range(1, 6)}
        number_of: dict[int, int] = {}
        waiting: Counter[int] = Counter()
        served = {pair: [0, 0] for pair in combinations(longest, 2)}  # since both wait
        for uid in range(1500):
            if rng.random() < 0.6:
                number = rng.choice(list(longest))
                queue.add(request(uid, rng.randint(1, longest[number]), **{flow: number}))
                number_of[uid] = number
                waiting[number] += 1
            elif len(queue):
                popped = pop(queue)
                number = number_of[popped.uid]
                for pair, tokens in served.items():
                    if number in pair:
                        tokens[pair.index(number)] += len(popped.tokens)
                    assert abs(tokens[0] - tokens[1]) <= longest[pair[0]] + longest[pair[1]]
                waiting[number] -= 1
            for pair in served:
                if not (waiting[pair[0]] and waiting[pair[1]]):
                    served[pair] = [0, 0]


def test_short_request_goes_before_the_rest_of_a_long_call() -> None:
    queue = WaitingQueue()
    for uid in range(128):
        queue.add(request(uid, 1900, client=1, call=1))
    for _ in range(2):
        pop(queue)
    queue.add(request(900, 6, client=1, call=2))
    queue.add(request(901, 6, client=2, call=3))
    assert drain(queue)[:3] == [901, 900, 2]


def test_client_that_waits_for_one_request_at_a_time_is_charged_for_all() -> None:
    queue = WaitingQueue()
    for uid in range(4):
        queue.add(request(uid, 10, client=1))
    queue.add(request(10, 10, client=2))
    order = []
    for uid in range(11, 14):  # client 2 sends its next request when the last one has been admitted
        while (popped := pop(queue)).client != 2:
            order.append(popped.client)
        order.append(popped.client)
        queue.add(request(uid, 10, client=2))
    assert order == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("by_priority", [False, True])
def test_lower_priority_goes_first_whatever_its_client(by_priority: bool) -> None:
    queue = WaitingQueue(by_priority=by_priority)
    for uid, priority in enumerate([-1, -5, -3, -5, -2]):
        queue.add(request(uid, client=uid % 2, priority=priority))
    assert drain(queue) == ([1, 3, 2, 4, 0] if by_priority else [0, 1, 2, 3, 4])


def test_flows_of_the_past_are_forgotten() -> None:
    time = VirtualTime()
    for flow in range(100_000):
        time.now = flow
        time.serve(flow, flow + 1)
    assert len(time._ends) <= 1024 + 2
    assert time.start(99_999) == 100_000
