"""`lockstep serve` in its own process: signals, draining, wrong flags."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from lockstep.launch import signals
from lockstep.launch.server.server_config import ServerConfig
from lockstep.launch.server.server_socket import bind

from fake_engine import KEY, PROMPT, Running
from listeners import urls_of
from small import COMMAND, SMALL_FLAGS
from step_gate import StepGate
from streams import begun_stream
from waiting import PATIENCE_S, wait_until

SERVE = ["serve", *SMALL_FLAGS]
NIGHTLY = pytest.mark.nightly


@pytest.fixture
def gate(tmp_path: Path) -> StepGate:
    """The limit of the steps of a server that `serve` starts with it."""
    return StepGate(tmp_path / "gate")


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`lockstep serve` in its own process."""
    started = []

    def start(*arguments: str, command: list[str] = COMMAND) -> subprocess.Popen[str]:
        command = [*command, *SERVE, *arguments]
        environment = os.environ | {"LOCKSTEP_API_KEY": KEY}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        status = process.poll()
        process.kill()
        print(f"status {status} before the end; the log: {process.communicate(timeout=PATIENCE_S)[1]}")


def address(process: subprocess.Popen[str]) -> str:
    """Return the URL in the log of a server, which is killed if that does not come in time."""
    assert process.stderr is not None
    killer = threading.Timer(PATIENCE_S, process.kill)
    killer.start()
    try:
        for line in process.stderr:
            if url := re.search(r"http://\S+", line):
                return url[0]
    finally:
        killer.cancel()
    raise AssertionError(f"the server ended before it served, or has not served within {PATIENCE_S:g} s")


@pytest.mark.process
def test_serve_command(serve: Callable[..., subprocess.Popen[str]]) -> None:
    process = serve("--port=0", "--served-model-name=demo")
    url = address(process)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=5)
    assert client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=3).choices[0].text
    assert httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).status_code == 401, "the key came from the environment"
    stream = iter(client.completions.create(model="demo", prompt=PROMPT, max_tokens=60, stream=True))
    next(stream)
    process.send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason in ("length", "stop"), "live requests may end"
    assert process.wait(60) == 0


@pytest.mark.process
def test_second_signal_aborts_requests(serve: Callable[..., subprocess.Popen[str]], gate: StepGate) -> None:
    process = serve("--port=0", "--served-model-name=demo", command=gate.command)
    gate.limit(20)
    url, body = address(process), {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with ThreadPoolExecutor(1) as thread, httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        answer = thread.submit(client.post, "/v1/completions", json=body)
        wait_until(lambda: httpx.get(f"{url}/stats", headers=headers, timeout=PATIENCE_S).json()["running"] == 1)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 503)
        process.send_signal(signal.SIGTERM)
        response = answer.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "aborted")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in log


@pytest.mark.process
def test_server_goes_on_while_nobody_reads_stderr(serve: Callable[..., subprocess.Popen[str]]) -> None:
    """Strangers and requests log far more than the pipe holds."""
    process = serve("--port=0", "--log-requests", "--max-concurrent-requests=100")
    url = httpx.URL(address(process))
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    for _ in range(60):
        with socket.create_connection((url.host, url.port or 0), timeout=60) as stranger:
            stranger.sendall(b"\x16\x03\x01 garbage\r\n\r\n")
            assert stranger.recv(20).startswith(b"HTTP/1.1 400")
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S) as client:
        for _ in range(80):  # a line of about 100 bytes each
            assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stderr.read().count("Invalid HTTP request") < 20, "a line a second"


@pytest.mark.process
@pytest.mark.parametrize("arguments", [("--tp=2",), ("--api-server-count=2",)])
def test_port_in_use_ends_the_command_before_anything_starts(
    serve: Callable[..., subprocess.Popen[str]], arguments: tuple[str, ...]
) -> None:
    with bind(ServerConfig(port=0)) as other:  # of a server that loads its model
        port = other.getsockname()[1]
        process = serve(f"--port={port}", *arguments)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port\n"


@pytest.mark.process
def test_wrong_template_ends_the_command_before_anything_starts(serve: Callable[..., subprocess.Popen[str]]) -> None:
    process = serve("--port=0", "--tp=2", "--chat-template=/no/such")
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert stderr == "error: chat_template='/no/such' cannot be read: [Errno 2] No such file or directory: '/no/such'\n"


@pytest.mark.process
def test_server_runs_without_standard_streams() -> None:
    command = [*COMMAND, *SERVE, "--port=0"]
    with subprocess.Popen(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command]) as process:
        try:
            wait_until(lambda: any(map(_answers, urls_of(process.pid))))
            (url,) = filter(_answers, urls_of(process.pid))
            body = {"prompt": PROMPT, "max_tokens": 3}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.process
def test_serve_command_ends_at_second_signal(serve: Callable[..., subprocess.Popen[str]], gate: StepGate) -> None:
    process = serve("--port=0", command=gate.command)
    gate.limit(20)
    url = address(process)
    body, headers = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True}, {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as client, begun_stream(client, body):
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT


@pytest.mark.process
@pytest.mark.parametrize("after_s", [pytest.param(0.1, marks=NIGHTLY), 1.0, pytest.param(2.5, marks=NIGHTLY)])
def test_serve_command_signal_at_startup(serve: Callable[..., subprocess.Popen[str]], after_s: float) -> None:
    process = serve("--port=0", "--drain-timeout=0")
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert "Traceback" not in stderr


def test_sigterm_dropped_by_a_destructor_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossy:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def drop_and_wait() -> None:
        Lossy()
        time.sleep(10)

    monkeypatch.setattr(signals, "_terminated", False)
    monkeypatch.setattr(sys, "unraisablehook", signals.resend_dropped)
    handler = signal.signal(signal.SIGTERM, signals.interrupt)
    try:
        with pytest.raises(signals.Terminated):
            drop_and_wait()
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.process
def test_serve_command_bad_flags(serve: Callable[..., subprocess.Popen[str]], shared: Running) -> None:
    for flag, message in (
        (f"--port={shared.port.getsockname()[1]}", "error: cannot listen on 127.0.0.1 port"),
        ("--max-n=1000", "error: max_n=1000 must be between 1 and 128"),
    ):
        process = serve(flag)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2
        assert stderr.strip().splitlines()[-1].startswith(message)
