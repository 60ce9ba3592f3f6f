"""Replicas under Ray Serve: where a request goes, and that the tokens are one rank's whatever happens to a replica."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from lockstep import LLM, SamplingParams
from lockstep.comm.message_sockets import PullSocket, WakeupEvent
from lockstep.launch import executor_choice
from lockstep.launch.errors import ReplicaFailed, RequestsLost
from lockstep.launch.server.server_config import ServerConfig
from lockstep.runtime.config import Config
from lockstep.runtime.outputs import RequestOutput
from lockstep.runtime.plan import RequestEnd, StepOutput
from lockstep.runtime.scheduler.waiting_queue import WaitingQueue

from processes import kill_marked, marked, new_mark
from small import COMMAND, SMALL, SMALL_FLAGS
from streams import begun_stream
from waiting import holds_within, wait_until

pytest.importorskip("grpc", reason="needs lockstep[serve]")

PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is", "The sons of", "The king"]
LONG = 250  # tokens
QUEUED = 8  # more than are asked at once: who has no token yet counts as queued


def test_prefix_affinity_equals_brute_force() -> None:
    """Against the prompts themselves, with caches that forget nothing."""
    from lockstep.launch.replicas.router import PrefixAffinity  # needs Ray Serve

    draw = random.Random(1)
    affinity, sent = PrefixAffinity(page_size=4, num_pages=10_000), dict[str, list[list[int]]]()
    for _ in range(300):
        prompt = [draw.randrange(2) for _ in range(draw.randrange(40))]
        replica = draw.choice("abc")
        for other in "abc":
            known = [common(prompt, old) // 4 * 4 for old in sent.get(other, [])]
            assert affinity.num_cached(np.array(prompt, np.int32), other) == max(known, default=0)
        affinity.add(np.array(prompt, np.int32), replica)
        sent.setdefault(replica, []).append(prompt)
    affinity.keep("ac")
    assert affinity.num_cached(np.array(sent["b"][-1], np.int32), "b") == 0


def common(a: list[int], b: list[int]) -> int:
    """Return the number of tokens with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_prefix_affinity_keeps_as_many_pages_as_the_cache() -> None:
    from lockstep.launch.replicas.router import PrefixAffinity  # needs Ray Serve

    affinity = PrefixAffinity(page_size=2, num_pages=3)
    old, new = np.arange(8, dtype=np.int32), np.arange(100, 104, dtype=np.int32)
    affinity.add(old, "a")
    assert affinity.num_cached(old, "a") == 6, "of four pages the last one is forgotten: it is used least"
    affinity.add(new, "a")
    assert affinity.num_cached(new, "a") == 4
    assert affinity.num_cached(old, "a") == 2
    assert isinstance(affinity._pages["a"], OrderedDict)


def test_lost_and_refused_requests_are_both_reported() -> None:
    from lockstep.launch.replicas.replica_executor import ReplicaExecutor  # needs Ray Serve

    executor: Any = ReplicaExecutor.__new__(ReplicaExecutor)  # without a cluster
    executor._inbox, executor._connection = (
        PullSocket("127.0.0.1"),
        SimpleNamespace(wakeup=WakeupEvent(), failure=None, is_lost=lambda: False),
    )
    executor._attempts, executor._waiting = {0: 10, 1: 11, 2: 12}, WaitingQueue()
    executor._calls = {uid: (number, Future()) for number, uid in executor._attempts.items()}
    executor._lost, executor._refused = deque([(0, "died"), (9, "out of date")]), deque([(1, "full")])
    assert executor.poll(0.0) == [StepOutput(finished=[RequestEnd(11, "abort", error="full")])]
    with pytest.raises(RequestsLost, match="died") as caught:
        executor.poll(0.0)
    assert caught.value.uids == [10]
    assert executor.poll(0.0) == []
    assert executor._attempts == {2: 12}
    executor._inbox.close()
    executor._connection.wakeup.close()


def test_failed_replica_refuses_calls_and_gets_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Serve keeps it for some seconds, in which it has the prefix and the least to do."""
    from ray.serve.config import RequestRouterConfig

    from lockstep.launch.replicas import failed_replicas, router  # needs Ray Serve
    from lockstep.launch.replicas.replica import Replica

    failed: Any = Replica.__new__(Replica)
    failed._failure, failed._thread = ReplicaFailed("rank 0 died", "a"), SimpleNamespace(post=lambda command: None)
    request: Any = SimpleNamespace(uid=1, tokens=np.arange(8, dtype=np.int32), cache_salt=None)
    with pytest.raises(ReplicaFailed, match="rank 0 died") as raised:
        asyncio.run(asyncio.wait_for(failed.run(request), 60))
    del failed._thread  # its destructor would stop it
    assert pickle.loads(pickle.dumps(raised.value)).replica == "a"

    monkeypatch.setattr(failed_replicas, "_failed", set())
    pickled = RequestRouterConfig(request_router_class=router.PrefixRouter).get_request_router_class()  # as Serve does
    choice: Any = pickled.__new__(pickled)
    choice._affinity, choice._replica_queue_len_cache = router.PrefixAffinity(4, 100), {}
    choice._affinity.add(request.tokens, "a")
    context = SimpleNamespace(should_backoff=False)
    pending: Any = SimpleNamespace(args=[request], routing_context=context)
    replicas: Any = [SimpleNamespace(replica_id=ReplicaName(name)) for name in ("a", "b")]

    def chosen() -> list[str]:
        ranked = asyncio.run(choice.choose_replicas(replicas, pending))
        return [replica.replica_id.unique_id for (replica,) in ranked]

    assert chosen() == ["a", "b"]
    failed_replicas.avoid("a")
    assert chosen() == ["b"]
    assert not context.should_backoff
    assert caplog.messages == []
    failed_replicas.avoid("b")
    assert chosen() == chosen() == []
    assert caplog.messages == ["no replica runs: requests wait until Ray Serve has started one; see serve status"]
    assert context.should_backoff


class ReplicaName(NamedTuple):
    unique_id: str


def test_ray_serve_with_an_open_port_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_choice.metadata, "version", lambda name: "2.57.1")
    with pytest.raises(ValueError, match=r"^replicas=2 needs Ray 2.58 or later, and this is 2.57.1: "):
        executor_choice.start_replicas(Config(), None, 2, 8)  # type: ignore[arg-type]


class Server:
    """`lockstep serve --replicas 2`, its processes known by a mark."""

    def __init__(self, log: Path) -> None:
        self.mark = new_mark()
        self.log = log
        command = [*COMMAND, "serve", "--replicas=2", "--port=0", f"--max-queued={QUEUED}", *SMALL_FLAGS]
        environment = {**os.environ, **self.mark}
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        assert holds_within(120, lambda: "http://" in self.said() or self.process.poll() is not None)
        assert self.process.poll() is None, self.said()
        self.url = self.said().rpartition(" on ")[2].split()[0]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def said(self) -> str:
        return self.log.read_text()

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/stats").json()
        return found

    def live(self) -> int:
        stats = self.stats()  # once: between two readings a request may begin
        return int(stats["running"] + stats["waiting"])

    def ranks(self) -> list[int]:
        return [rank["pid"] for rank in self.stats()["ranks"]]

    @contextmanager
    def held(self, ranks: list[int]) -> Iterator[None]:
        """Stop these processes within the block: no stream comes to an end."""
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def marked(self, title: str = "") -> list[int]:
        return list(marked(self.mark, title))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("fleet") / "log")
    try:
        yield started
        started.process.terminate()
        assert started.process.wait(60) == 0
        wait_until(lambda: not started.marked())
    finally:
        kill_marked(started.mark)


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    """Return the greedy outputs of one rank."""
    with LLM(**SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True)
        results: list[RequestOutput] = llm.generate(PROMPTS, params, use_tqdm=False)
    return [result.outputs[0].text for result in results]


async def stream(url: str, prompt: str, got: list[str]) -> None:
    body = {"prompt": prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(base_url=url, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                got.append(httpx.Response(200, text=line[6:]).json()["choices"][0]["text"])


@pytest.mark.process
@pytest.mark.serial
def test_replicas_give_the_tokens_of_one_rank(server: Server, undisturbed: list[str]) -> None:
    assert len(server.ranks()) == 2
    got: list[list[str]] = [[] for _ in PROMPTS]

    async def main() -> None:
        await asyncio.gather(*(stream(server.url, prompt, own) for prompt, own in zip(PROMPTS, got, strict=True)))

    asyncio.run(main())
    assert ["".join(own) for own in got] == undisturbed
    assert min(map(len, got)) > 1, "each text came in parts, which are long if the machine is busy"


@pytest.mark.process
@pytest.mark.serial
def test_router_prefers_the_replica_with_the_prefix(server: Server) -> None:
    """Each of several long prefixes comes again and again, and is computed once."""
    stories = [f"{name} " * 40 for name in ("Moses", "Aaron", "David", "Esther")]
    cached = 0
    for turn in range(3):
        for story in stories:
            body = {"prompt": story + "x" * turn, "max_tokens": 1, "temperature": 0}
            usage = server.http.post("/v1/completions", json=body).json()["usage"]
            if turn:
                cached += usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] // 16 * 16 - 32
    assert cached == 2 * len(stories)


@pytest.mark.process
@pytest.mark.serial
def test_client_disconnect_cancels_in_replicas(server: Server) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 1900, "ignore_eos": True, "n": 4}
    ranks = server.ranks()
    with begun_stream(server.http, body), server.held(ranks):
        assert server.live() == 4
    wait_until(lambda: server.live() == 0)

    def ranks_stand_still() -> bool:
        steps = server.stats()["steps"]
        time.sleep(0.5)
        return bool(server.stats()["steps"] == steps)

    before = server.stats()["steps"]
    assert holds_within(60, ranks_stand_still)
    assert server.stats()["steps"] < before + 100, "far from 1,900 tokens"


@pytest.mark.process
@pytest.mark.serial
def test_requests_beyond_the_queue_are_refused(server: Server) -> None:
    at_once = 2 * SMALL["max_num_seqs"]
    body = {"prompt": PROMPTS[0], "max_tokens": 1900, "ignore_eos": True, "n": at_once}
    more = {"prompt": [PROMPTS[0]] * (QUEUED + 1), "max_tokens": 2}
    ranks = server.ranks()
    with begun_stream(server.http, body):
        with server.held(ranks):
            response = server.http.post("/v1/completions", json=more)
        assert response.status_code == 429
        assert response.headers["retry-after"]
    more["prompt"] = [PROMPTS[0]] * (at_once + QUEUED)
    wait_until(lambda: server.live() == 0)
    assert len(server.http.post("/v1/completions", json=more).json()["choices"]) == at_once + QUEUED


@pytest.mark.process
@pytest.mark.serial
@pytest.mark.parametrize("victim", [pytest.param("ranks", marks=pytest.mark.nightly), "replica"])
def test_replica_killed_is_replaced_and_streams_continue(server: Server, undisturbed: list[str], victim: str) -> None:
    """The ranks of a replica are killed, or the replica itself with its ranks."""
    ranks = server.ranks()
    victims = ranks[:1] if victim == "ranks" else server.marked("ServeReplica")[:1]
    prompts = PROMPTS * 2  # more than one replica takes at once, so that each has some
    assert len(prompts) > SMALL["max_num_seqs"]

    async def outputs() -> tuple[list[str], bool]:
        """Return the texts, and whether all streams were live when the victims were killed."""
        got: list[list[str]] = [[] for _ in prompts]
        tasks = [asyncio.create_task(stream(server.url, prompt, own)) for prompt, own in zip(prompts, got, strict=True)]
        while not all(got):
            await asyncio.sleep(0.002)
            assert not any(task.done() and task.exception() for task in tasks), "a stream has failed"
        with server.held(ranks):
            was_live = server.live() == len(prompts)
            for pid in victims if was_live else ():
                os.kill(pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
        return ["".join(own) for own in got], was_live

    for _ in range(10):  # until the ranks are stopped in time
        texts, was_killed = asyncio.run(outputs())
        assert texts == undisturbed * 2
        if was_killed:
            break
    assert was_killed
    assert holds_within(120, lambda: len(set(server.ranks()) - set(ranks)) == 1), server.said()
    assert server.http.get("/health").status_code == 200
    assert "rerouted to others" in server.said()


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.serial
def test_front_end_killed_leaves_no_processes(tmp_path: Path) -> None:
    started = Server(tmp_path / "log")
    try:
        started.process.kill()
        started.process.wait(60)
        wait_until(lambda: not started.marked("Worker.run") and not started.marked("ServeReplica"))
    finally:
        kill_marked(started.mark)


def test_replicas_are_an_option_of_the_server() -> None:
    assert ServerConfig().replicas == 1
    with pytest.raises(ValueError, match="replicas=0 must be at least 1"):
        ServerConfig(replicas=0)
