"""Ranks as Ray actors give the tokens of one rank, and every failure ends soon, says why and leaves nothing behind.

Most tests use the Ray cluster of this process, as a user's own program would; those at the end start commands, some
with a cluster of two nodes. Processes are known by a mark in their environment.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file, save_file

from lockstep import LLM, SamplingParams
from lockstep.launch.cluster import actor_group
from lockstep.launch.cluster.ray_executor import RayExecutor
from lockstep.launch.cluster.worker import Worker
from lockstep.launch.errors import PlacementError, RankFailed
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.executor import EngineClosed
from lockstep.runtime.model.checkpoint import find_model
from lockstep.runtime.offline import OfflineLLM
from lockstep.runtime.outputs import Event, RequestOutput
from lockstep.runtime.request import RequestRefused

from listeners import free_port
from processes import is_running, kill_marked, marked, new_mark
from small import COMMAND, SMALL, SMALL_FLAGS
from waiting import left_after, wait_until

PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is"]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True, n=2)
LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=1500, ignore_eos=True)
HANGS = r"^no step has ended for \d+ s, .*rank 0 on [^\n]*$"
BUG = r"^rank 1 on [^\n]* failed: IndexError: pop from empty list$"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[LLM]:
    with LLM(**SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def two_ranks(ray_cluster: dict[str, str]) -> Iterator[LLM]:
    with LLM(tensor_parallel_size=2, **SMALL) as llm:
        yield llm


@pytest.fixture
def victim(ray_cluster: dict[str, str]) -> Iterator[LLM]:
    """Two ranks that a test may break."""
    with LLM(tensor_parallel_size=2, **SMALL) as llm:
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
def test_tokens_of_two_ranks_equal_one_rank(one_rank: LLM, two_ranks: LLM, params: SamplingParams) -> None:
    results = two_ranks.generate(PROMPTS, params, use_tqdm=False)
    assert tokens(results) == tokens(one_rank.generate(PROMPTS, params, use_tqdm=False))
    assert len({tuple(t) for t in tokens(results)}) == len(PROMPTS) * params.n


def test_streamed_text_is_the_final_text(two_ranks: LLM) -> None:
    pieces: dict[tuple[int, int], list[str]] = {}
    results = {}
    for event in two_ranks.stream(PROMPTS, SEEDED):
        if isinstance(event, Event):
            pieces.setdefault((event.prompt, event.index), []).append(event.text)
        else:
            results[event.prompt] = event
    final = {(i, o.index): o.text for i, prompt in enumerate(PROMPTS) for o in results[prompt].outputs}
    assert {turn: "".join(texts) for turn, texts in pieces.items()} == final
    assert len(final) == len(PROMPTS) * SEEDED.n
    assert min(len(texts) for texts in pieces.values()) > 3


@pytest.mark.parametrize(
    "prompt", ["", [3, 99999], [-1], [5] * 3000], ids=["empty", "too high", "negative", "too long"]
)
def test_refused_request_leaves_others_alone(two_ranks: LLM, prompt: Any) -> None:
    with pytest.raises(RequestRefused):
        two_ranks.generate([PROMPTS[0], prompt], GREEDY, use_tqdm=False)
    assert len(tokens(two_ranks.generate(PROMPTS[:1], GREEDY, use_tqdm=False))[0]) == GREEDY.max_tokens


def test_close_with_requests_in_flight_leaves_nothing(victim: LLM) -> None:
    workers = pids(victim)
    assert all(map(is_running, workers))
    stream = victim.stream(PROMPTS, LONG)
    next(stream)
    victim.close()
    victim.close()
    assert not left_after(lambda: [pid for pid in workers if is_running(pid)])
    with pytest.raises(EngineClosed, match="this LLM is closed"):
        victim.generate(PROMPTS, GREEDY, use_tqdm=False)
    with pytest.raises(EngineClosed, match="this LLM is closed"):
        list(stream)
    with pytest.raises(EngineClosed, match="ended by close"):
        victim.executor.poll(0)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_rank_killed_is_reported_at_once(victim: LLM, rank: int) -> None:
    """step_timeout is far away: the report does not wait for it."""
    workers = pids(victim)
    stream = victim.stream(PROMPTS, LONG)
    for _ in range(5):
        next(stream)
    os.kill(workers[rank], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        list(stream)
    assert time.monotonic() - started < Config().step_timeout / 2
    message = str(caught.value)
    assert message.startswith(f"rank {rank} on {os.uname().nodename} (")
    assert f"pid {workers[rank]} died: " in message
    assert "\n" not in message
    with pytest.raises(RankFailed, match=f"rank {rank} on"):
        victim.generate(PROMPTS, GREEDY, use_tqdm=False)
    victim.close()
    assert not left_after(lambda: [pid for pid in workers if is_running(pid)])


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_hung_ends_group_after_step_timeout(ray_cluster: dict[str, str], rank: int) -> None:
    with LLM(tensor_parallel_size=2, step_timeout=2, **SMALL) as victim:
        workers = pids(victim)
        stream = victim.stream(PROMPTS, LONG)
        next(stream)
        os.kill(workers[rank], signal.SIGSTOP)
        with pytest.raises(RankFailed) as caught:
            list(stream)
    assert f"rank {rank} on" in str(caught.value)
    if "CommError" in str(caught.value):  # the other rank waited for it
        assert f"rank {1 - rank} of 2: all_" in str(caught.value)
        assert "longer than 2 s" in str(caught.value)
    assert not left_after(lambda: [pid for pid in workers if is_running(pid)])


def test_leader_hung_before_first_step_is_reported(
    ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other rank waits for it in a collective."""
    monkeypatch.setattr(actor_group, "Worker", failing("run", 0, lambda: time.sleep(600)))
    config = Config(tensor_parallel_size=2, step_timeout=1, **SMALL)
    folder, model = find_model(config)
    executor = RayExecutor(config, model, grace_s=1.0)
    with OfflineLLM(executor, model, folder) as llm, pytest.raises(RankFailed, match=HANGS):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("method", "rank"),
    [("load", 0), ("allocate", 1), pytest.param("bind", 1, marks=NIGHTLY), pytest.param("load", 1, marks=NIGHTLY)],
)
def test_rank_killed_at_start_up_is_named(
    ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, method: str, rank: int
) -> None:
    monkeypatch.setattr(actor_group, "Worker", failing(method, rank, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(RankFailed, match=rf"^rank {rank} on .* died: [^\n]*$"):
        LLM(tensor_parallel_size=2, **SMALL)
    assert not left_after(lambda: marked(ray_cluster, "FailingWorker"))


def test_rank_hung_at_start_up_is_named(ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the other rank takes to be there on a busy machine."""
    monkeypatch.setattr(actor_group, "Worker", failing("bind", 1, lambda: time.sleep(600)))
    with pytest.raises(RankFailed, match=r"^no answer to bind from .*rank 1 on .* within startup_timeout"):
        LLM(tensor_parallel_size=2, startup_timeout=3, **SMALL)
    assert not left_after(lambda: marked(ray_cluster, "FailingWorker"))


def test_exception_in_a_step_names_the_rank(ray_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_group, "Worker", failing("run", 1, lambda: [].pop()))
    with LLM(tensor_parallel_size=2, **SMALL) as llm, pytest.raises(RankFailed, match=BUG):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_value_error_of_a_rank_is_raised_as_value_error(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "other"))
    tensors = load_file(folder / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if "gate_proj" in name)[0, 0] = torch.nan  # only a rank reads it
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^.*gate_proj.* \(rank \d on .*\)$"):
        LLM(str(folder), tensor_parallel_size=2, **SMALL)


def test_placement_in_too_small_cluster_fails_at_once(ray_cluster: dict[str, str]) -> None:
    cpus = ray.cluster_resources()["CPU"]
    with pytest.raises(
        PlacementError, match=rf"^2 ranks with 1 CPU, 1 GPU each never fit .* has {cpus:g} CPU; free in all"
    ):
        LLM(tensor_parallel_size=2, **{**SMALL, "device": "cuda"})


def test_placement_waits_for_nodes_to_join(ray_cluster: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """test_nodes.py has a node that joins in time."""
    with pytest.raises(PlacementError, match=r"^after \d s, 2 ranks with 1 CPU, 1 GPU each never fit "):
        LLM(tensor_parallel_size=2, wait_for_resources=3, **{**SMALL, "device": "cuda"})
    assert "of 3 s, nodes are missing: " in caplog.text


def test_device_auto_is_refused_while_nodes_may_join(ray_cluster: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^device='auto' is open while .* give --device cuda or cpu$"):
        LLM(tensor_parallel_size=2, wait_for_resources=3, **{**SMALL, "device": "auto"})


def test_placement_in_busy_cluster_waits_and_logs(two_ranks: LLM, caplog: pytest.LogCaptureFixture) -> None:
    others = placement_group([{"CPU": 1}])  # and two_ranks has 2 of the 4
    assert others.wait(60)
    started = time.monotonic()
    try:
        with pytest.raises(
            PlacementError, match=r"^no room for 2 ranks .* within \d s, others hold it: .*free in all: 1 CPU"
        ):
            LLM(tensor_parallel_size=2, wait_for_resources=3, **SMALL)
    finally:
        remove_placement_group(others)
    assert time.monotonic() - started > 3
    assert re.search("waiting for 2 ranks with 1 CPU each, [23] of 3 s, others hold them: ", caplog.text)


GENERATE = [*COMMAND, "generate", *SMALL_FLAGS]
ENDLESS = ["--tp=2", "--prompt=In the", "--max-tokens=1900", "--ignore-eos"]
FIELDS = {"prompt", "index", "text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"}
UNLIMITED = SamplingParams(temperature=0.8, seed=3, max_tokens=12, n=2)
FLAGS = ["--temperature=0.8", "--top-p=1", "--top-k=0", "--seed=3", "--max-tokens=12", "-n", "2", "--json"]


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a command in its own session, as in another terminal."""
    environment = {**os.environ, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        arguments,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        start_new_session=True,
    )


def run(arguments: list[str], environment: dict[str, str]) -> str:
    """stdout of a command that must succeed."""
    process = start(arguments, environment)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


@pytest.fixture
def own_mark() -> Iterator[dict[str, str]]:
    """The mark of one test; nothing with it may be left, once Ray has seen that its owner is gone."""
    mark = new_mark()
    yield mark
    left = left_after(lambda: marked(mark))
    kill_marked(mark)
    assert not left


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.process
def test_generate_command_prints_tokens_of_one_rank(own_mark: dict[str, str], one_rank: LLM) -> None:
    before = shared_memory()
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS[:2]]
    lines = run([*GENERATE, "--tp=2", *FLAGS, *prompts], own_mark).splitlines()
    assert not marked(own_mark)  # not a moment later
    assert not shared_memory() - before
    found = [json.loads(line) for line in lines]
    found.sort(key=lambda line: (PROMPTS.index(line["prompt"]), line["index"]))
    assert all(set(line) == FIELDS for line in found)
    expected = one_rank.generate(PROMPTS[:2], UNLIMITED, use_tqdm=False)
    assert [line["token_ids"] for line in found] == tokens(expected)
    assert [line["text"] for line in found] == [output.text for result in expected for output in result.outputs]
    for line, result in zip(found, [r for r in expected for _ in range(2)], strict=True):
        assert line["prompt_tokens"] == len(result.prompt_token_ids)
        assert line["completion_tokens"] == len(line["token_ids"])
        assert line["finish_reason"] == ("length" if line["completion_tokens"] == 12 else "stop")


FORGETS_TO_CLOSE = f"""
import sys
from lockstep import LLM
llm = LLM(tensor_parallel_size=2, ray_address=sys.argv[1] if sys.argv[1:] else None, **{SMALL})
print(len(llm.generate("In the", use_tqdm=False)))
"""


@pytest.mark.process
def test_program_without_close_ends_its_ranks(ray_cluster: dict[str, str], ray_address: str) -> None:
    before = set(marked(ray_cluster, "ray::Worker"))
    assert run([sys.executable, "-c", FORGETS_TO_CLOSE, ray_address], {}) == "1\n"
    assert not left_after(lambda: set(marked(ray_cluster, "ray::Worker")) - before)


@pytest.mark.nightly
@pytest.mark.process
def test_program_without_close_ends_its_cluster(own_mark: dict[str, str]) -> None:
    assert run([sys.executable, "-c", FORGETS_TO_CLOSE], own_mark) == "1\n"


def orphans(mark: dict[str, str], number: int) -> list[str]:
    """Return the processes that are left after a signal to the owner.

    After SIGKILL Ray's two agents may try for 60 s (a constant of Ray) to report the raylet's end to a GCS that has
    ended as well.
    """
    left = marked(mark).values()
    return [title for title in left if number != signal.SIGKILL or not title.rstrip().endswith("Agent")]


SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.process
@pytest.mark.parametrize(
    ("phase", "numbers"),
    [
        ("generating", [signal.SIGKILL, signal.SIGTERM]),
        pytest.param("generating", [signal.SIGINT], marks=NIGHTLY),
        pytest.param("gcs_server", list(SIGNALS), marks=NIGHTLY),
    ],
)
def test_ranks_and_ray_end_with_their_owner(phase: str, numbers: list[signal.Signals]) -> None:
    """Send each signal while Ray starts or while the ranks work; Ctrl-C reaches the whole session."""
    marks = {number: new_mark() for number in numbers}
    owners = {number: start([*GENERATE, *ENDLESS], mark) for number, mark in marks.items()}
    try:
        for number, owner in owners.items():
            assert owner.stdout is not None
            if phase == "generating":
                assert owner.stdout.read(1)
            else:
                wait_until(lambda n=number: marked(marks[n], phase))  # type: ignore[misc]
            (os.killpg if number == signal.SIGINT else os.kill)(owner.pid, number)
        for number, owner in owners.items():
            assert owner.wait(60) in (SIGNALS[number], *([15] if phase == "gcs_server" else []))
            assert not left_after(lambda n=number: orphans(marks[n], n))  # type: ignore[misc]
            assert owner.stderr is not None
            assert "Traceback" not in owner.stderr.read()
    finally:
        for mark in marks.values():
            kill_marked(mark)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[tuple[dict[str, str], str]]:
    """A Ray cluster of two nodes with one CPU each, on this machine: what to set to use it, and its address."""
    folder = Path(tempfile.mkdtemp(prefix="ls-"))  # short: it holds sockets, whose paths end at 107 characters
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(uuid.uuid4().hex * 2)
    environment = {**new_mark(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port = free_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false"]
    nodes = []
    try:
        for role in (head, [f"--address={address}"]):
            nodes.append(start_node(role, environment))
        yield environment, address
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
        left = left_after(lambda: marked(environment))
    finally:
        kill_marked(environment)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


def start_node(role: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """`ray start --block`, which ends the node when it is ended; returns once the node runs."""
    ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *role]
    node = start([*ray_start, "--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000"], environment)
    watchdog = threading.Timer(90, node.kill)
    watchdog.start()
    assert node.stdout is not None
    said = list(itertools.takewhile(lambda line: "Ray runtime started" not in line, node.stdout))
    watchdog.cancel()
    assert node.poll() is None, said
    return node


@pytest.mark.process
def test_cluster_of_two_nodes(two_nodes: tuple[dict[str, str], str], one_rank: LLM) -> None:
    """One CPU a node: two ranks can only run on different ones. The next test names the cluster by a flag."""
    environment, address = two_nodes
    command = [*GENERATE, "--tp=2", *FLAGS, f"--prompt={PROMPTS[0]}"]
    out = run(command, {**environment, "RAY_ADDRESS": address})
    assert not left_after(lambda: marked(environment, "ray::Worker"))
    expected = tokens(one_rank.generate(PROMPTS[:1], UNLIMITED, use_tqdm=False))
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == expected


@pytest.mark.process
def test_ranks_on_a_cluster_end_with_their_owner(two_nodes: tuple[dict[str, str], str]) -> None:
    environment, address = two_nodes
    owner = start([*GENERATE, *ENDLESS, f"--ray-address={address}"], environment)
    assert owner.stdout is not None
    assert owner.stdout.read(1)
    assert len(marked(environment, "ray::Worker")) == 2
    owner.kill()
    owner.wait(60)
    assert not left_after(lambda: marked(environment, "ray::Worker"))
    assert len(marked(environment, "/raylet/raylet")) == 2
