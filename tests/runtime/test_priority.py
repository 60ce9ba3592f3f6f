"""Requests with priorities: the order of admission and preemption against a sorted list, and the refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from lockstep import LLM, SamplingParams
from lockstep.runtime.engine import Engine
from lockstep.runtime.request import Request, RequestRefused
from lockstep.runtime.scheduler.waiting_queue import WaitingQueue

from engines import request, run_engine


def prioritized(uid: int, priority: int, length: int = 12) -> Request:
    prompt = np.random.default_rng(uid).integers(3, 131, length).tolist()
    return replace(request(uid, prompt, max_tokens=6, temperature=1), priority=priority)


@pytest.mark.parametrize(("tp", "slots"), [(1, 1), (1, 3), (2, 1)])
def test_lowest_priority_number_goes_first(llama_folder: Path, tp: int, slots: int) -> None:
    rng = random.Random(slots)
    requests = [prioritized(uid, rng.choice([-(2**62), -1, 0, 0, 5])) for uid in range(14)]
    options: dict[str, Any] = {"max_num_seqs": slots, "scheduling_policy": "priority"}
    actual = run_engine(llama_folder, requests, tp=tp, **options)
    expected = [r.uid for r in sorted(requests, key=lambda r: (r.priority, r.uid))]
    assert list(actual.tokens) == expected, "the order of first tokens"
    alone = run_engine(llama_folder, [replace(r, priority=0) for r in requests], tp=tp, max_num_seqs=slots)
    assert actual.tokens == alone.tokens


def test_request_that_comes_later_overtakes(llama_folder: Path) -> None:
    def add(step: int, engine: Engine) -> None:
        if step == 2:
            engine.add([prioritized(10, -1)])

    options: dict[str, Any] = {"max_num_seqs": 1, "scheduling_policy": "priority"}
    actual = run_engine(llama_folder, [prioritized(uid, 0) for uid in range(3)], between=add, **options)
    assert list(actual.tokens) == [0, 10, 1, 2], "running requests are not interrupted for it"


def test_pages_are_taken_from_the_lowest_priority(llama_folder: Path) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, seed=1)
    requests = [replace(prioritized(uid, priority, 20), params=params) for uid, priority in enumerate([5, 1, 5, 1])]
    preempted: list[set[int]] = []

    def note(step: int, engine: Engine) -> None:
        if engine.scheduler.num_preemptions:
            preempted.append({r.uid for r in engine.scheduler.waiting})

    options: dict[str, Any] = {"max_num_seqs": 4, "scheduling_policy": "priority", "num_pages": 50}
    actual = run_engine(llama_folder, requests, between=note, **options)
    assert actual.preemptions > 0
    assert preempted[0] == {2}, "the newest of those with the lowest priority"
    roomy = run_engine(llama_folder, requests, max_num_seqs=4, scheduling_policy="priority", num_pages=200)
    assert actual.tokens == roomy.tokens


def test_priorities_are_refused_without_the_policy() -> None:
    params = SamplingParams(max_tokens=1)
    with LLM(device="cpu", num_pages=64, max_num_seqs=2) as llm:
        llm.generate(["a", "b"], params, use_tqdm=False, priority=[0, 0])
        with pytest.raises(RequestRefused, match="prompt 1: priority=3 has no effect here; start with --scheduling"):
            llm.generate(["a", "b"], params, use_tqdm=False, priority=[0, 3])
        with pytest.raises(ValueError, match="1 priorities for 2 prompts"):
            llm.generate(["a", "b"], params, use_tqdm=False, priority=[0])
    with LLM(device="cpu", num_pages=64, max_num_seqs=1, scheduling_policy="priority") as llm:
        results = llm.generate(["a", "b", "c"], params, use_tqdm=False, priority=[2, 1, -7])
        assert [len(result.outputs[0].token_ids) for result in results] == [1, 1, 1]


def test_queue_by_priority_is_a_sorted_list() -> None:
    rng, queue = random.Random(0), WaitingQueue(by_priority=True)
    waiting: list[Request] = []
    for uid in range(400):
        if waiting and rng.random() < 0.4:
            head = queue.head()
            assert head is not None
            expected = min(waiting, key=lambda r: (r.priority, r.uid))
            assert queue.pop(head.client) is head is expected
            waiting.remove(head)
        added = prioritized(uid, rng.randrange(-3, 3))
        queue.add(added)
        waiting.append(added)
