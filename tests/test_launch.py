"""Ranks as Ray actors: same tokens as one rank, and every way of failing ends soon, says why, and leaves nothing behind.

The tests share one small Ray of this process, as a user's own program would have it; what starts and ends Ray itself is
in test_processes.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from lockstep import LLM, SamplingParams
from lockstep.launch import ranks
from lockstep.launch.cluster import RayExecutor
from lockstep.launch.errors import PlacementError, RankFailed
from lockstep.launch.worker import Worker
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.frontend import RequestRefused
from lockstep.runtime.outputs import Delta, RequestOutput

from owned import is_running, kill_marked, marked, new_mark, wait_until_gone

SMALL: dict[str, Any] = {"device": "cpu", "num_pages": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256}
PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is"]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True, n=2)
LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=1500, ignore_eos=True)
CPUS = 4


@pytest.fixture(scope="module")
def mark() -> Iterator[dict[str, str]]:
    """Starts Ray, with a mark on its processes and room for two groups of two ranks."""
    mark = new_mark()
    os.environ.update(mark)
    ray.init(
        address="local",
        num_cpus=CPUS,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield mark
    ray.shutdown()
    left = wait_until_gone(mark, 15)
    kill_marked(mark)
    assert not left


@pytest.fixture(scope="module")
def one_rank() -> Iterator[LLM]:
    with LLM(**SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def two_ranks(mark: dict[str, str]) -> Iterator[LLM]:
    with LLM(tensor_parallel_size=2, **SMALL) as llm:
        yield llm


@pytest.fixture
def victim(mark: dict[str, str]) -> Iterator[LLM]:
    """Two ranks that a test may break."""
    with LLM(tensor_parallel_size=2, step_timeout=2, **SMALL) as llm:
        yield llm


def executor(llm: LLM) -> RayExecutor:
    assert isinstance(llm.executor, RayExecutor)
    return llm.executor


def pids(llm: LLM) -> list[int]:
    return [endpoint.pid for endpoint in executor(llm)._ranks.endpoints]


def failing(method: str, rank: int, action: Callable[[], object]) -> type[Worker]:
    """A Worker that does `action` first when `method` is called on this rank; it travels to the actor by value."""

    def act_first(self: Worker, *arguments: Any) -> Any:
        if self.rank == rank:
            action()
        return getattr(Worker, method)(self, *arguments)

    return type("FailingWorker", (Worker,), {method: act_first})


def tokens(results: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for result in results for output in result.outputs]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded, n=2"])
def test_two_ranks_give_the_tokens_of_one(one_rank: LLM, two_ranks: LLM, params: SamplingParams) -> None:
    results = two_ranks.generate(PROMPTS, params, use_tqdm=False)
    assert tokens(results) == tokens(one_rank.generate(PROMPTS, params, use_tqdm=False))
    assert len({tuple(t) for t in tokens(results)}) == len(PROMPTS) * params.n


def test_streamed_text_is_the_final_text(two_ranks: LLM) -> None:
    pieces: dict[tuple[int, int], list[str]] = {}
    results = {}
    for event in two_ranks.stream(PROMPTS, SEEDED):
        if isinstance(event, Delta):
            pieces.setdefault((event.prompt, event.output), []).append(event.text)
        else:
            results[event.prompt] = event
    final = {(i, o.index): o.text for i, prompt in enumerate(PROMPTS) for o in results[prompt].outputs}
    assert {turn: "".join(texts) for turn, texts in pieces.items()} == final
    assert len(final) == len(PROMPTS) * SEEDED.n
    assert min(len(texts) for texts in pieces.values()) > 3


@pytest.mark.parametrize(
    "prompt", ["", [3, 99999], [-1], [5] * 3000], ids=["empty", "too high", "negative", "too long"]
)
def test_a_refused_request_hurts_nobody(two_ranks: LLM, prompt: Any) -> None:
    with pytest.raises(RequestRefused):
        two_ranks.generate([PROMPTS[0], prompt], GREEDY, use_tqdm=False)
    assert len(tokens(two_ranks.generate(PROMPTS[:1], GREEDY, use_tqdm=False))[0]) == GREEDY.max_tokens


def test_close_with_requests_in_flight_leaves_nothing(victim: LLM) -> None:
    workers = pids(victim)
    assert all(map(is_running, workers))
    stream = victim.stream(PROMPTS, LONG)
    next(stream)
    started = time.monotonic()
    victim.close()
    victim.close()
    assert time.monotonic() - started < 10
    assert not any(map(is_running, workers))
    with pytest.raises(RankFailed, match="close"):
        victim.generate(PROMPTS, GREEDY, use_tqdm=False)
    with pytest.raises(RankFailed, match="close"):
        list(stream)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_reported_at_once(victim: LLM, rank: int) -> None:
    workers = pids(victim)
    stream = victim.stream(PROMPTS, LONG)
    for _ in range(5):
        next(stream)
    os.kill(workers[rank], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        list(stream)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert message.startswith(f"rank {rank} on {os.uname().nodename} (")
    assert f"pid {workers[rank]} died: " in message
    assert "\n" not in message
    with pytest.raises(RankFailed, match=f"rank {rank} on"):
        victim.generate(PROMPTS, GREEDY, use_tqdm=False)
    victim.close()
    assert not any(map(is_running, workers))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_ends_the_group_after_step_timeout(victim: LLM, rank: int) -> None:
    workers = pids(victim)
    stream = victim.stream(PROMPTS, LONG)
    next(stream)
    os.kill(workers[rank], signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        list(stream)
    assert time.monotonic() - started < 2 + 5 + 3  # step_timeout, time for the ranks to say why, time to end them
    assert f"rank {rank} on" in str(caught.value)
    if "CommError" in str(caught.value):  # the other rank waited for it
        assert f"rank {1 - rank} of 2: all_" in str(caught.value)
        assert "longer than 2 s" in str(caught.value)
    victim.close()
    assert not any(map(is_running, workers))


def test_a_leader_that_hangs_alone_is_noticed(mark: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it in a collective: it hangs before its first step."""
    monkeypatch.setattr(ranks, "Worker", failing("run", 0, lambda: time.sleep(600)))
    with LLM(tensor_parallel_size=2, step_timeout=1, **SMALL) as llm:
        with pytest.raises(RankFailed, match=r"no step has ended for \d+ s.*rank 0 on"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.parametrize("method", ["bind", "load", "allocate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_at_start_up_is_named(
    mark: dict[str, str], monkeypatch: pytest.MonkeyPatch, method: str, rank: int
) -> None:
    monkeypatch.setattr(ranks, "Worker", failing(method, rank, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    started = time.monotonic()
    with pytest.raises(RankFailed, match=rf"^rank {rank}.* died: [^\n]*$"):
        LLM(tensor_parallel_size=2, **SMALL)
    assert time.monotonic() - started < 20
    assert not marked(mark, "FailingWorker")


def test_a_rank_that_hangs_at_start_up_is_named(mark: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "Worker", failing("load", 1, lambda: time.sleep(600)))
    with pytest.raises(RankFailed, match=r"^no answer to load from .*rank 1 on .* within startup_timeout"):
        LLM(tensor_parallel_size=2, startup_timeout=6, **SMALL)
    assert not marked(mark, "FailingWorker")


def test_an_exception_in_a_step_is_reported_as_the_ranks(mark: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "Worker", failing("run", 1, lambda: [].pop()))
    with LLM(tensor_parallel_size=2, **SMALL) as llm:
        with pytest.raises(RankFailed, match=r"^rank 1 on .*failed: IndexError: pop from empty list$"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_what_only_the_ranks_find_wrong_is_the_users_error(mark: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"^.*model\.safetensors is corrupt or incomplete.* \(rank \d on .*\)$"):
        LLM(str(folder), tensor_parallel_size=2, **SMALL)


def test_a_request_that_never_fits_is_refused_at_once(mark: dict[str, str]) -> None:
    started = time.monotonic()
    with pytest.raises(
        PlacementError, match=rf"^2 ranks with 1 CPU, 1 GPU each never fit .* has {CPUS} CPU; free in all"
    ):
        LLM(tensor_parallel_size=2, **{**SMALL, "device": "cuda"})
    assert time.monotonic() - started < 3


def test_a_busy_cluster_is_waited_for_in_the_open(two_ranks: LLM, caplog: pytest.LogCaptureFixture) -> None:
    others = placement_group([{"CPU": 1}])  # and two_ranks has 2 of the 4
    assert others.wait(10)
    started = time.monotonic()
    try:
        with pytest.raises(
            PlacementError, match=r"^no room for 2 ranks .* within 3 s, others hold it: .*free in all: 1 CPU"
        ):
            LLM(tensor_parallel_size=2, wait_for_resources=3, **SMALL)
    finally:
        remove_placement_group(others)
    assert 3 < time.monotonic() - started < 6
    assert "waiting for 2 ranks with 1 CPU each, 2 of 3 s" in caplog.text
