"""Disconnects, failures, recovery, draining, metrics and logs over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import httpx
import openai
import pytest

from lockstep.launch.engine.engine_state import Health
from lockstep.launch.errors import EngineFailed
from lockstep.launch.server import http_io
from lockstep.launch.server.refusal_pacing import RefusalPacing
from lockstep.launch.server.serve import serve_until_signal
from lockstep.launch.server.server_config import ServerConfig, ServerLimits
from lockstep.launch.server.server_socket import bind
from lockstep.launch.server.uvicorn_setup import run_loop
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, COMPLETION, PROMPT, FakeService, Running, error_of, fake
from waiting import join, wait_until


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 3])
def test_disconnect_cancels_within_a_step(run: Callable[..., Running], stream: bool, prompts: int) -> None:
    running = run()
    service = fake(running)
    service.step_s = 0.05
    body = json.dumps({**COMPLETION, "prompt": [PROMPT] * prompts, "max_tokens": 400, "n": 2, "stream": stream})
    raw = socket.create_connection(running.port.getsockname())
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    wait_until(lambda: service.steps > 3)
    left = service.steps
    raw.close()
    wait_until(lambda: len(service.cancelled) == prompts)
    assert max(service.cancelled) - left < 100 * prompts, "of 400 steps each"
    assert service.live == 0
    assert running.post("/v1/completions", {**COMPLETION, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("OSError: [Errno 2] No such file: '/srv/models/llama/a.safetensors'", "No such file: 'a.safetensors'"),
        ('cannot read "/home/user/x y/model.json"; see http://host/docs/page', "see http://host/docs/page"),
        ("rank 1 on host: /opt/venv/lib/python3.12/torch/x.py:12, in /root/lockstep", "host: x.py:12, in lockstep"),
        ("40/100 pages, /tmp is full, 3 tokens/s", "40/100 pages, /tmp is full, 3 tokens/s"),
    ],
)
def test_errors_show_no_folders_of_the_server(run: Callable[..., Running], reason: str, shown: str) -> None:
    running = run(keep_alive_on_engine_death=True)  # it would end while the answers are read
    fake(running).fails = EngineFailed(reason)
    streamed = running.post("/v1/completions", {**COMPLETION, "stream": True}).text
    whole = running.post("/v1/completions", COMPLETION)
    fake(running).health = Health("failed", reason)
    answers = [whole, running.http.get("/health"), running.http.get("/v1/models"), running.http.get("/stats")]
    for text in (streamed, *(answer.text for answer in answers)):
        assert shown in text
        assert not re.search(r"/(srv|home|opt|root)", text), text


def test_many_disconnects(run: Callable[..., Running]) -> None:
    running = run(max_concurrent_requests=64)
    fake(running).step_s = 0.002
    for i in range(50):
        with running.http.stream(
            "POST", "/v1/completions", json={**COMPLETION, "max_tokens": 400, "stream": True}
        ) as s:
            for _, _ in zip(range(i % 3), s.iter_lines(), strict=False):
                pass
    wait_until(lambda: fake(running).live == 0)
    assert running.post("/v1/completions", COMPLETION).status_code == 200


def test_recovery_pauses_streams(run: Callable[..., Running]) -> None:
    running = run()
    service = fake(running)
    service.step_s = 0.01
    expected = running.post("/v1/completions", {**COMPLETION, "max_tokens": 30}).json()["choices"][0]["text"]
    stream = running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=30, stream=True)
    text = next(iter(stream)).choices[0].text
    service.health, service.paused = Health("recovering", "rank 1 died: signal 9", restarts=1), True
    response = running.http.get("/health")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "rank 1 died" in error_of(response)["message"]
    new: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: new.append(running.post("/v1/completions", COMPLETION)))
    thread.start()  # waits as well
    time.sleep(0.1)
    assert not new
    service.health, service.paused = Health("ready", restarts=1), False
    assert running.http.get("/health").status_code == 200
    assert text + "".join(c.choices[0].text for c in stream) == expected
    join(thread)
    assert new[0].status_code == 200


def test_engine_failure_is_reported(run: Callable[..., Running]) -> None:
    running = run(keep_alive_on_engine_death=True)
    service = fake(running)
    service.fails = EngineFailed("rank 1 died too often")
    response = running.post("/v1/completions", COMPLETION)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_failed")
    assert "retry-after" in response.headers
    with pytest.raises(openai.APIError, match="rank 1 died too often"):
        list(running.openai.chat.completions.create(model="demo", messages=cast(Any, CHAT), stream=True))
    service.health = Health("failed", "rank 1 died too often")
    for call in (lambda: running.post("/v1/completions", COMPLETION), lambda: running.http.get("/health"),
                 lambda: running.http.get("/v1/models")):  # fmt: skip
        response = call()
        assert response.status_code == 503
        assert "rank 1 died too often" in error_of(response)["message"]


@pytest.mark.parametrize("is_draining", [False, True])
def test_engine_failure_ends_the_server(run: Callable[..., Running], is_draining: bool) -> None:
    """Streams get their error before, and `serve` raises it for the exit status and the last line."""
    running = run(drain_timeout=30)
    service = fake(running)
    service.hold_at, service.fails = 2, EngineFailed("Ray's raylet was killed")  # at the third token
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=400, stream=True))
    next(stream)
    if is_draining:
        running.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: service.health.state == "draining")
    service.health, service.hold_at = Health("failed", "Ray's raylet was killed"), math.inf
    with pytest.raises(openai.APIError, match="raylet was killed"):
        list(stream)
    join(running.thread)
    assert running.server.failure == "Ray's raylet was killed"


def test_serve_raises_the_failure_of_the_engine(tokenizer: Tokenizer) -> None:
    service, options = FakeService(tokenizer), ServerConfig(port=0)
    service.health = Health("failed", "Ray's raylet was killed")
    with bind(options) as listener, pytest.raises(EngineFailed, match=r"^Ray's raylet was killed$"):
        asyncio.run(serve_until_signal(cast(Any, service), options, listener))


def test_health_detects_a_stall(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(stall_timeout_s=0.3))
    assert running.http.get("/health").json() == {"status": "ok"}
    service = fake(running)
    service.paused = True
    threading.Thread(target=running.post, args=("/v1/completions", COMPLETION)).start()
    wait_until(lambda: service.live == 1)
    wait_until(lambda: running.http.get("/health").status_code == 503)
    assert "no step for" in error_of(running.http.get("/health"))["message"]
    service.paused = False
    wait_until(lambda: running.http.get("/health").status_code == 200)
    wait_until(lambda: service.live == 0)
    time.sleep(0.4)
    assert running.http.get("/health").status_code == 200, "idle is healthy"


def test_first_signal_drains(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=60)
    service = fake(running)
    service.hold_at = 5
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=60, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: service.health.state == "draining")
    response = running.post("/v1/completions", COMPLETION)
    assert (response.status_code, error_of(response)["code"]) == (503, "draining")
    assert running.http.get("/health").status_code == 503
    service.hold_at = math.inf
    assert list(stream)[-1].choices[0].finish_reason == "length"
    join(running.thread)
    assert running.server.forced_by is None


def test_drain_timeout_aborts(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=0.1)
    fake(running).hold_at = 5
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=480, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    join(running.thread)


def test_second_signal_ends_at_once(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=60)
    fake(running).hold_at = 5
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=480, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    running.server.handle_exit(signal.SIGINT, None)
    join(running.thread)
    assert running.server.forced_by == signal.SIGINT


def test_internal_error_fails_one_request(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: Any) -> None:
        raise ZeroDivisionError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(shared.service, "generate", fault)
        for stream in (False, True):
            response = shared.post("/v1/completions", {**COMPLETION, "stream": stream})
            assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
            assert "secret" not in response.text
    assert shared.post("/v1/completions", COMPLETION).status_code == 200


def test_other_loop_without_uvloop(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def name_of_loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    caplog.set_level("INFO")
    assert run_loop(name_of_loop()).startswith("uvloop")
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run_loop(name_of_loop()).startswith("asyncio")
    assert [record.levelname for record in caplog.records if "event loop" in record.message] == ["INFO", "WARNING"]


def test_metrics(run: Callable[..., Running]) -> None:
    running = run()
    running.post("/v1/completions", {**COMPLETION, "n": 2, "prompt": [5, 6, 7]})
    response = running.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    values = {
        name: float(value) for name, value in re.findall(r"^(lockstep:\S+) (\S+)$", response.text, re.M)
    }  # fmt: skip
    label = '{engine="0",model_name="demo"}'
    assert values[f"lockstep:prompt_tokens_total{label}"] == 3
    assert values[f"lockstep:generation_tokens_total{label}"] == 8
    assert values['lockstep:request_success_total{engine="0",finished_reason="length",model_name="demo"}'] == 2
    assert values[f"lockstep:time_to_first_token_seconds_count{label}"] == 1
    assert values[f"lockstep:inter_token_latency_seconds_count{label}"] == 6
    assert values[f"lockstep:request_time_per_output_token_seconds_count{label}"] == 2
    assert values[f"lockstep:e2e_request_latency_seconds_count{label}"] == 2
    assert values[f"lockstep:kv_cache_usage_perc{label}"] == 0.25
    assert values[f"lockstep:kv_cache_free_pages{label}"] == 384
    assert values[f"lockstep:num_requests_running{label}"] == values[f"lockstep:num_requests_waiting{label}"] == 0
    assert values[f"lockstep:prefix_cache_hits_total{label}"] == 10
    assert values[f"lockstep:prefix_cache_queries_total{label}"] == 40
    assert values[f"lockstep:num_preemptions_total{label}"] == 3


def test_log_lines_have_no_prompts(run: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    running = run(log_requests=True)
    headers = {"x-request-id": "abc-7"}
    running.post("/v1/completions", {**COMPLETION, "prompt": "a secret word"}, headers=headers)
    running.post("/v1/completions", {**COMPLETION, "prompt": "a secret word", "temperature": 9})
    assert "request abc-7 answered: 1 prompt of" in caplog.text
    assert "secret" not in caplog.text


def test_slow_tokenization_does_not_block_other_requests(
    shared: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, answered = threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slow(text: str, **options: bool) -> list[int]:
        if text == "slow":
            started.set()
            assert answered.wait(60)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", slow)
    thread = threading.Thread(target=shared.post, args=("/v1/completions", {**COMPLETION, "prompt": "slow"}))
    thread.start()
    assert started.wait(60)
    assert shared.post("/v1/completions", COMPLETION).status_code == 200
    answered.set()
    join(thread)


def test_long_body_is_parsed_in_a_thread(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    parse = http_io._parse

    def spy(content: bytes, model: Any) -> Any:
        threads.append(threading.current_thread().name)
        return parse(content, model)

    monkeypatch.setattr(http_io, "_parse", spy)
    shared.post("/v1/completions", COMPLETION)
    shared.post("/v1/completions", {**COMPLETION, "user": "x" * 100_000})
    assert threads[0] == shared.thread.name
    assert threads[1] != shared.thread.name


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{",
        b"GET /nothing HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
    ids=["not arrived", "refused, which waits"],
)
def test_request_without_an_answer_at_the_end_gets_503(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(RefusalPacing, "next_delay", lambda self, address, now: 60.0)
    running = run()
    running.server.config.timeout_graceful_shutdown = cast(int, 0.1)
    with socket.create_connection(running.port.getsockname(), timeout=60) as raw:
        raw.sendall(sent)
        wait_until(lambda: bool(running.server.server_state.tasks))
        running.server.handle_exit(signal.SIGTERM, None)
        answer = raw.recv(1000)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"draining"' in answer
    join(running.thread)
    assert "Traceback" not in caplog.text
