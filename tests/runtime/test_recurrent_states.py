"""Models with recurrent states in the whole engine: batches, chunks, preemption, and prefixes cached with their state.

float32 on a CPU, token for token, as in test_engine.py. Prefix hits are counted by a reference, page by page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.runtime.limits import Limits
from lockstep.runtime.scheduler.prefix_cache import Node
from lockstep.runtime.scheduler.saved_states import SavedStates
from lockstep.runtime.scheduler.scheduler import Scheduler

from checkpoints import tiny_checkpoint
from engines import Results, request, run_engine

ARCHITECTURE = "Qwen3_5ForCausalLM"
PAGE = 4  # tokens of a page in run_engine
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "chunks of 7 tokens": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "one token at a time": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "no prefix cache": {"enable_prefix_caching": False},
    "page size 5": {"page_size": 5},
    "four at a time, so that states are given up": {"max_num_seqs": 4},
    "results one step late, few pages": {"overlap": True, "num_pages": 36, "max_model_len": 128, "tp": 2},
    "two ranks, few pages, chunks": {"tp": 2, "num_pages": 40, "max_num_batched_tokens": 32, "max_model_len": 128},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    tiny_checkpoint(folder, ARCHITECTURE)
    return folder


def conversations() -> list[list[int]]:
    """Prompts of which many begin alike: with a common system prompt, or with another prompt as a whole."""
    rng = np.random.default_rng(5)
    system = rng.integers(3, 131, 37).tolist()
    first = [system + rng.integers(3, 131, n).tolist() for n in (3, 11, 20, 27)]
    return [
        *first,
        first[1] + rng.integers(3, 131, 9).tolist(),
        first[2],
        system,
        *(p[:n] for p, n in zip(first, (39, 40, 41), strict=False)),
    ]


def mixed() -> list[Any]:
    kinds = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
    return [request(i, p, max_tokens=20, **kinds[i % 3]) for i, p in enumerate(conversations())]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, list[int]]:
    """The tokens of each request in an engine of its own, which has no cached prefix."""
    return {r.uid: run_engine(folder, [r]).tokens[r.uid] for r in mixed()}


@pytest.mark.parametrize("options", list(ARRANGEMENTS.values()), ids=list(ARRANGEMENTS))
def test_tokens_are_those_of_the_request_alone(
    folder: Path, alone: dict[int, list[int]], options: dict[str, Any]
) -> None:
    actual = run_engine(folder, mixed(), **options)
    assert actual.tokens == alone
    if "num_pages" in options:
        assert actual.preemptions > 0, "meant to run out of pages"


def one_after_another(folder: Path, prompts: list[list[int]], **options: Any) -> Results:
    """Run the prompts in one engine, each when the one before has ended."""
    requests = [request(i, p, max_tokens=6) for i, p in enumerate(prompts)]

    def between(step: int, engine: Any) -> None:
        if not engine.has_work and requests:
            engine.add([requests.pop(0)])

    return run_engine(folder, [requests.pop(0)], between=between, **options)


def test_prefixes_are_continued_from_saved_states(folder: Path, alone: dict[int, list[int]]) -> None:
    """A state is saved at the last whole page of a prompt, and where a later prompt leaves a cached one."""
    rng = np.random.default_rng(6)
    system, tails = rng.integers(3, 131, 40).tolist(), [rng.integers(3, 131, 9).tolist() for _ in range(4)]
    prompts = [system + tail for tail in tails]
    prompts.append(prompts[0] + rng.integers(3, 131, 5).tolist())
    results = one_after_another(folder, prompts)
    # The second prompt saves the state after the system prompt, which the third and the fourth use.
    assert [results.cached[i] for i in range(5)] == [0, 0, 40, 40, 48]
    for i, prompt in enumerate(prompts):
        assert results.tokens[i] == run_engine(folder, [request(i, prompt, max_tokens=6)]).tokens[i]


def test_a_request_of_the_same_step_does_not_use_its_states(folder: Path) -> None:
    prompt = list(range(3, 60))
    results = run_engine(folder, [request(i, prompt, max_tokens=6) for i in range(3)])
    assert list(results.cached.values()) == [0, 0, 0]
    assert results.tokens[0] == results.tokens[1] == results.tokens[2]
    again = one_after_another(folder, [prompt, prompt])
    assert again.cached[1] == (len(prompt) - 1) // PAGE * PAGE
    assert again.tokens[1] == results.tokens[0]


def limits_with(saved_states: int) -> Limits:
    return Limits(
        max_model_len=64, max_num_seqs=5, max_num_batched_tokens=24, num_pages=20, page_size=4, vocab_size=9,
        has_states=True, saved_states=saved_states,
    )  # fmt: skip


def test_random_requests_keep_the_states_consistent() -> None:
    """Each state and each key that a plan reads was written for exactly these tokens, by a replay of all plans."""
    rng = np.random.default_rng(0)
    limits = limits_with(4)
    scheduler, uid, hits = Scheduler(limits), 0, 0
    states: dict[int, tuple[int, ...]] = {}  # the tokens that each state stands for
    tokens: dict[int, list[int]] = {}  # by slot
    cached: dict[int, int] = {}  # by slot: tokens whose keys are not stored again
    pages: dict[tuple[int, int], int] = {}  # by slot and index
    keys: dict[tuple[int, int], tuple[int, ...]] = {}  # by page and offset: the tokens up to the stored one
    for _ in range(600):
        while rng.random() < 0.6:
            prompt = [1, 2, 3, 4] * int(rng.integers(0, 5)) + rng.integers(0, 3, int(rng.integers(1, 16))).tolist()
            scheduler.add(request(uid, prompt, max_tokens=int(rng.integers(1, 12))))
            uid += 1
        if rng.random() < 0.2 and uid:
            scheduler.cancel(int(rng.integers(0, uid)))
        scheduled = scheduler.schedule()
        if scheduled is None:
            continue
        plan = scheduled.plan
        for admission in plan.admitted:
            tokens[admission.slot] = admission.tokens.tolist()
            states[admission.slot] = states[admission.state] if admission.state >= 0 else ()
            hits += admission.state >= 0
            cached[admission.slot] = admission.num_cached
            assert len(states[admission.slot]) <= admission.num_cached
        pages |= {(slot, index): page for slot, index, page in plan.page_writes.reshape(-1, 3).tolist()}
        saves = plan.state_saves.reshape(-1, 2, 2) if len(plan.state_saves) else np.zeros((len(plan.slots), 2, 2), int)
        written: list[int] = []
        for slot, start, count, pairs in zip(plan.slots.tolist(), plan.starts, plan.counts, saves, strict=True):
            known = tuple(tokens[slot])
            assert states[slot] == known[:start], "the slot's state is not that before its next token"
            for at, state in pairs.tolist():
                if at:
                    assert 0 < at <= count
                    assert state > limits.max_num_seqs
                    states[state] = known[: start + at]
                    written.append(state)
            states[slot] = known[: start + count]
            for position in range(max(start, cached[slot]), start + count):
                keys[pages[slot, position // 4], position % 4] = known[: position + 1]
        assert len(set(written)) == len(written), "two rows write to one state"
        for slot, start, count in zip(plan.slots.tolist(), plan.starts, plan.counts, strict=True):
            for position in range(start + count):  # read after all rows have stored theirs
                assert keys[pages[slot, position // 4], position % 4] == tuple(tokens[slot][: position + 1])
        sampled = rng.integers(0, 9, len(scheduled.slots)).astype(np.int32)
        for slot, token in zip(scheduled.slots.tolist(), sampled.tolist(), strict=True):
            tokens[slot].append(token)
        scheduler.commit(scheduled, sampled)
    assert hits > 50
    assert scheduler.num_preemptions > 0


def test_the_state_used_longest_ago_is_given_up() -> None:
    def states(count: int) -> SavedStates:
        return SavedStates(limits_with(count))

    saved, nodes = states(2), [Node(np.zeros(4, np.int32), np.zeros(1, np.int32), None) for _ in range(3)]
    for clock, node in enumerate(nodes[:2]):
        node.last_used = clock
        assert saved.save(node, step=1) == 6 + clock
        assert saved.save(node, step=2) is None
    assert saved.save(nodes[2], step=1) is None, "both are written in this step"
    nodes[0].last_used = 5
    assert saved.save(nodes[2], step=3) == 7
    assert [node.state for node in nodes] == [6, -1, 7]
    assert states(0).save(nodes[1], step=1) is None
