"""API servers in other processes than the engine: the same answers, errors and limits as in its own process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.engine.grammar_check import GrammarsWaiting
from lockstep.launch.errors import EngineFailed, RequestCrashedEngine
from lockstep.launch.server.api_errors import ApiError
from lockstep.launch.server.api_server_messages import EncodedError
from lockstep.launch.server.message_link import MessageLink
from lockstep.launch.server.request_metrics import RequestMetrics
from lockstep.runtime.config import Config
from lockstep.runtime.request import RequestRefused

from fake_engine import CHAT, PROMPT, Running
from linked_client import LinkedClient, linked_clients
from processes import is_running
from small import COMMAND, SMALL, SMALL_FLAGS
from step_gate import StepGate, steps_limited
from streams import begun_stream
from waiting import PATIENCE_S, wait_until

SEEDED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "seed": 3, "temperature": 0.8}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
CALL: dict[str, Any] = {
    "messages": CHAT, "seed": 1, "max_tokens": 60, "tools": TOOLS, "tool_choice": "required",
}  # fmt: skip
LONG = [5 + i % 90 for i in range(301)]  # its log-probabilities are several messages
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", SEEDED),
    ("/v1/completions", {**SEEDED, "prompt": [PROMPT, "Blessed"], "n": 3, "logprobs": 2}),
    ("/v1/completions", {**SEEDED, "echo": True, "logprobs": 1, "return_token_ids": True}),
    ("/v1/completions", {**SEEDED, "prompt": [5, 6, 7], "n": 2, "prompt_logprobs": 2, "cache_salt": "a"}),
    ("/v1/completions", {**SEEDED, "prompt": LONG, "prompt_logprobs": 20, "n": 3}),
    ("/v1/completions", {**SEEDED, "echo": True, "max_tokens": 0}),
    ("/v1/completions", {**SEEDED, "stop": ["the", "of"], "include_stop_str_in_output": True, "max_tokens": 60}),
    ("/tokenize", {"prompt": PROMPT, "return_token_strs": True}),
    ("/detokenize", {"tokens": [300, 301, 302]}),
    # errors of the schema, of the validation and of the front end
    ("/v1/completions", {**SEEDED, "no_such_field": 1}),
    ("/v1/completions", {**SEEDED, "n": 9}),
    ("/v1/completions", {**SEEDED, "model": "other"}),
    ("/v1/completions", {**SEEDED, "prompt": [5] * 5000}),
    ("/v1/completions", {**SEEDED, "prompt": []}),
    ("/v1/completions", {**SEEDED, "allowed_token_ids": [0], "min_tokens": 2}),
    ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_schema"}}),
    ("/v1/messages", {"model": "demo", "messages": CHAT, "max_tokens": 100_000}),
]  # fmt: skip
SLOW_BODIES: list[tuple[str, dict[str, Any]]] = [  # they start the processes of grammars and chats
    ("/v1/completions", {**SEEDED, "guided_regex": "[a-c]{3,5}"}),
    ("/v1/completions", {**SEEDED, "guided_regex": "("}),
    ("/v1/chat/completions", CALL),
    ("/v1/responses", {"input": "Who was Moses?", "max_output_tokens": 9, "temperature": 0}),
    ("/v1/messages", {"model": "demo", "messages": CHAT, "max_tokens": 9, "temperature": 0}),
    ("/v1/messages/count_tokens", {"model": "demo", "messages": CHAT}),
    ("/v1/chat/completions", {"messages": CHAT, "seed": 1, "max_tokens": 9, "logprobs": True, "top_logprobs": 3}),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    started = AsyncEngine(Config(**SMALL))
    started.start()
    yield started
    asyncio.run(started.close())


@pytest.fixture
def serve(engine: AsyncEngine) -> Iterator[Callable[..., Running]]:
    """A function that starts a server over the one engine; it is closed after the test."""
    running: list[Running] = []

    def start(**options: Any) -> Running:
        running.append(Running(engine, **({"served_model_name": ["demo"]} | options)))
        return running[-1]

    yield start
    for server in running:
        server.close()


def comparable(text: str) -> Any:
    """Return a response without its random ids and its times; numbers may differ in their last bits.

    Which prompts share a step depends on their arrival.
    """
    text = re.sub(r'"(id|response_id|item_id|request_id)":"[a-z_]*-?[0-9a-zA-Z]{20,}"', r'"\1":""', text)
    return approximate(json.loads(re.sub(r'"(created|created_at|completed_at)":("[^"]*"|[0-9.]+)', r'"\1":0', text)))


def approximate(value: Any) -> Any:
    """Return a value of JSON in which numbers equal similar ones."""
    if isinstance(value, dict):
        return {key: approximate(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [approximate(entry) for entry in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def joined(stream: str) -> tuple[dict[int, str], list[Any]]:
    """Return the texts of a stream of completions, and everything else but its chunks' borders."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event.get("choices", ())]
    texts: dict[int, str] = {}
    for choice in choices:
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    ends = [[choice["finish_reason"], choice["stop_reason"]] for choice in choices if choice["finish_reason"]]
    return texts, [*ends, events[-1]["usage"]]


@pytest.mark.parametrize("bodies", [BODIES, pytest.param(SLOW_BODIES, marks=pytest.mark.nightly)])
def test_answers_and_errors_are_those_of_one_process(serve: Callable[..., Running], bodies: Any) -> None:
    alone, linked = serve(), serve(new_client=linked_clients())
    for path, body in bodies:
        alone.post(path, body)  # then the prefix is cached for both
        expected, actual = alone.post(path, body), linked.post(path, body)
        assert actual.status_code == expected.status_code, (path, body)
        assert comparable(actual.text) == comparable(expected.text), (path, body)
        varying = {"date": "", "x-request-id": "", "request-id": "", "content-length": ""}
        assert dict(actual.headers) | varying == dict(expected.headers) | varying


def test_streams_and_pages_are_those_of_one_process(serve: Callable[..., Running]) -> None:
    alone, linked = serve(), serve(new_client=linked_clients())
    streamed = {**SEEDED, "max_tokens": 40, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    assert joined(linked.post("/v1/completions", streamed).text) == joined(alone.post("/v1/completions", streamed).text)
    for path in ("/health", "/v1/models", "/version", "/tokenizer_info", "/v1/models/demo"):
        assert comparable(linked.http.get(path).text) == comparable(alone.http.get(path).text)
    assert linked.http.get("/stats").json().keys() == alone.http.get("/stats").json().keys()


def test_limits_count_the_requests_of_all_api_servers(serve: Callable[..., Running], engine: AsyncEngine) -> None:
    new_client = linked_clients()
    first = serve(new_client=new_client, max_concurrent_requests=1)
    second = serve(new_client=new_client, max_concurrent_requests=1)
    body = {**SEEDED, "max_tokens": 1500, "ignore_eos": True}
    with steps_limited(engine, 20), begun_stream(first.http, body):
        refused = second.post("/v1/completions", SEEDED)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "1 request with 1 output" in refused.json()["error"]["message"]
    wait_until(lambda: engine.stats().num_live == 0)
    wait_until(lambda: second.post("/v1/completions", SEEDED).status_code == 200)


def test_lost_api_server_frees_the_engine_and_the_limits(serve: Callable[..., Running], engine: AsyncEngine) -> None:
    clients: list[LinkedClient] = []
    new_client = linked_clients()

    def noted(*arguments: Any) -> LinkedClient:
        clients.append(new_client(*arguments))
        return clients[-1]

    lost, other = serve(new_client=noted, max_concurrent_requests=1), serve(new_client=noted)
    body = {**SEEDED, "max_tokens": 1500, "ignore_eos": True, "n": 2}
    with ExitStack() as limited:
        limited.enter_context(steps_limited(engine, 20))
        with begun_stream(lost.http, body):
            wait_until(lambda: engine.stats().num_live == 2)
            assert lost.server._loop is not None
            lost.server._loop.call_soon_threadsafe(clients[0].gateway.close)
            wait_until(lambda: engine.stats().num_live == 0)
            limited.close()
            assert other.post("/v1/completions", SEEDED).status_code == 200


def test_failures_keep_their_class() -> None:
    for error in (
        ApiError(429, "busy", param="n", code="rate_limit_exceeded"), RequestRefused("no"), GrammarsWaiting("later"),
        RequestCrashedEngine("again"), EngineFailed("gone"),
    ):  # fmt: skip
        copy = EncodedError.of(error).exception()
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)
    assert type(EncodedError.of(KeyError("x")).exception()) is RuntimeError


def test_metrics_add_up() -> None:
    first, second = RequestMetrics(num_generated=3), RequestMetrics(num_generated=4)
    first.count_end("stop")
    second.count_end("stop")
    second.count_end("abort")
    for metrics, values in ((first, (0.002, 0.3)), (second, (0.3, 100.0))):
        for value in values:
            metrics.first_token_s.observe(value)
    total = first + second
    assert (total.num_generated, total.num_ended) == (7, {"stop": 2, "abort": 1})
    assert total.first_token_s.counts[-1] == 1
    assert sum(total.first_token_s.counts) == 4
    assert total.first_token_s.total == pytest.approx(100.602)
    assert (first.num_generated, sum(first.first_token_s.counts)) == (3, 2), "the summands stay as they are"


def test_messages_arrive_whole_and_in_order() -> None:
    chance = random.Random(1)
    messages = [chance.randbytes(chance.choice([0, 1, 3, 200, 300_000])) for _ in range(60)]

    async def exchange() -> list[bytes]:
        received: list[bytes] = []
        lost = asyncio.Event()
        sender, receiver = MessageLink(received.append, lambda: None), MessageLink(received.append, lost.set)
        for link, end in zip((sender, receiver), socket.socketpair(), strict=True):
            await link.connect(end)
        for message in messages:
            sender.send(message)
        sender.close()
        await asyncio.wait_for(lost.wait(), 30)
        return received

    assert asyncio.run(exchange()) == messages


@pytest.fixture
def gate(tmp_path: Path) -> StepGate:
    """The limit of the steps of the server that `command` starts."""
    return StepGate(tmp_path / "gate")


@pytest.fixture
def command(gate: StepGate) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str, Path]]]:
    """A function that starts `lockstep serve` and returns the process, its URL and its log; killed after the test."""
    started: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder:

        def start(*flags: str) -> tuple[subprocess.Popen[str], str, Path]:
            log = Path(folder, f"{len(started)}.log")
            arguments = [*gate.command, "serve", *SMALL_FLAGS, "--port=0", "--no-preflight", *flags]
            with log.open("w") as stderr:
                started.append(subprocess.Popen(arguments, stderr=stderr, text=True))
            wait_until(lambda: " on http://" in log.read_text() or started[-1].poll() is not None)
            url = re.search(r"http://\S+", log.read_text())
            assert url is not None, log.read_text()
            return started[-1], url[0], log

        yield start
        for process in started:
            process.kill()
            process.wait()


def api_servers(process: subprocess.Popen[str]) -> list[int]:
    """Return the pids of the API servers of a server."""
    pids = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    return [pid for pid in pids if "api_server_process" in Path(f"/proc/{pid}/cmdline").read_text()]


def stream(url: str, seed: int, begun: list[int], max_tokens: int) -> tuple[str, bool]:
    """Return the text of a stream, and whether it has ended in order; appends the seed to `begun` meanwhile."""
    text, body = "", {**SEEDED, "seed": seed, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with (
        suppress(httpx.TransportError),
        httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
    ):
        for line in response.iter_lines():
            if line == "data: [DONE]" or '"error"' in line:
                return text, "DONE" in line
            if line.startswith("data: {"):
                begun += [seed] * (not text)
                text += json.loads(line[6:])["choices"][0]["text"]
    return text, False


def begin_streams(
    threads: ThreadPoolExecutor, gate: StepGate, url: str, number: int, max_tokens: int
) -> list[Future[tuple[str, bool]]]:
    """Return streams that have begun, and do not end before the gate is opened."""
    begun: list[int] = []
    gate.limit(0)
    streams = [threads.submit(stream, url, seed, begun, max_tokens) for seed in range(number)]
    with httpx.Client(base_url=url, timeout=60) as client:  # more connections would move the streams
        wait_until(lambda: client.get("/stats").json()["waiting"] == number)
    gate.limit(20)
    wait_until(lambda: len(begun) == number)
    return streams


@pytest.mark.process
def test_killed_api_server_ends_its_connections_only(
    command: Callable[..., tuple[subprocess.Popen[str], str, Path]], gate: StepGate
) -> None:
    """Each of two processes has some of the streams. A drain then lets the live streams end."""
    process, url, log = command("--api-server-count=2")
    number, length = 6, 100
    expected = [stream(url, seed, [], length) for seed in range(number)]
    metrics = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    assert "generation_tokens_total" in metrics  # each process has reported its tokens
    with ThreadPoolExecutor(8) as threads:
        streams = begin_streams(threads, gate, url, number, length)
        victim = api_servers(process)[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: f"(pid {victim}) has ended" in log.read_text())
        gate.open()
        results = [one.result() for one in streams]
        num_ended = [ended for _, ended in results].count(True)
        assert 0 < num_ended < number
        for (text, ended), (whole, _) in zip(results, expected, strict=True):
            assert text == whole if ended else whole.startswith(text)
        assert "killed by SIGKILL; another one is started" in log.read_text()
        wait_until(lambda: "serves after" in log.read_text())
        assert len(set(api_servers(process)) - {victim}) == 2
        statistics = [httpx.get(f"{url}/stats", timeout=PATIENCE_S).json() for _ in range(4)]  # of both processes
        assert {each["running"] for each in statistics} == {0}
        pages = [httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text for _ in range(4)]
        counts = {re.search(r"generation_tokens_total\{.*\} (\S+)", page)[1] for page in pages}  # type: ignore[index]
        assert len(counts) == 1
        assert float(counts.pop()) >= (number + num_ended) * length, "those of the killed process count"
        streams = begin_streams(threads, gate, url, number, length)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining for up to" in log.read_text())
        gate.open()
        assert all(one.result()[1] for one in streams)
    assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.process
@pytest.mark.nightly
def test_server_ends_when_api_servers_end_too_often(
    command: Callable[..., tuple[subprocess.Popen[str], str, Path]],
) -> None:
    process, _, log = command("--api-server-count=2", "--max-restarts=1")
    for _ in range(2):
        wait_until(lambda: len(api_servers(process)) == 2)
        os.kill(api_servers(process)[-1], signal.SIGKILL)
        time.sleep(0.5)
    assert process.wait(60) == 1
    last = log.read_text().splitlines()[-1]
    assert re.match(r"error: API server \d .*: killed by SIGKILL; given up after 1 restart within 600 s$", last)


@pytest.mark.process
@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(
    command: Callable[..., tuple[subprocess.Popen[str], str, Path]], gate: StepGate, number: int
) -> None:
    """Two signals cut the streams off, also while an API server starts."""
    process, url, log = command("--api-server-count=3")
    pids = api_servers(process)
    with ThreadPoolExecutor(4) as threads:
        streams = begin_streams(threads, gate, url, 4, 1900)
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(60) == (128 + number if number == signal.SIGTERM else -number)
        assert not any(ended for _, ended in (one.result() for one in streams)) or number == signal.SIGTERM
    wait_until(lambda: not any(map(is_running, pids)))
    assert "Traceback" not in log.read_text()


@pytest.mark.process
@pytest.mark.nightly
def test_stopped_api_server_is_replaced(command: Callable[..., tuple[subprocess.Popen[str], str, Path]]) -> None:
    """Other processes serve meanwhile; the connections of the stopped one end with it."""
    process, url, log = command("--api-server-count=2")
    victim = api_servers(process)[0]
    os.kill(victim, signal.SIGSTOP)
    answered, deadline = 0, time.monotonic() + 45
    while "serves after" not in log.read_text() and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            answered += httpx.post(f"{url}/v1/completions", json=SEEDED, timeout=1).status_code == 200
        time.sleep(0.1)
    assert f"(pid {victim}) has sent nothing for 30 s and is killed" in log.read_text()
    assert answered > 30
    assert httpx.post(f"{url}/v1/completions", json=SEEDED, timeout=PATIENCE_S).status_code == 200


@pytest.mark.process
@pytest.mark.nightly
def test_mistake_found_by_api_servers_ends_the_start() -> None:
    arguments = [
        *COMMAND,
        "serve",
        *SMALL_FLAGS,
        "--port=0",
        "--api-server-count=2",
        "--tool-call-parser=response_template",
    ]
    alone = subprocess.run([*arguments, "--api-server-count=1"], capture_output=True, text=True, timeout=60)
    together = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert together.returncode == alone.returncode == 2
    assert together.stderr.splitlines()[-1] == alone.stderr.splitlines()[-1]
