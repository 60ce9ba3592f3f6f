"""Clients that are slow, silent or mad: what they hold is bounded, and given back.

The scripts of the same kind (scripts/soak_*.py) run here for a few seconds; scripts/results/ has what came of long
runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.server.server_config import ServerLimits

from fake_engine import COMPLETION, Running, error_of, fake
from small import COMMAND, SMALL, as_flags
from waiting import wait_until

SCRIPTS = Path(__file__).parents[3] / "scripts" / "soak"
PHASES = [  # of a start and an end, without the one that is tested daily
    "the interpreter starts",
    "torch is imported",
    "Ray is imported",
    "Ray's first server is there",
    "Ray's node is there",
    "Ray's agents are there",
    "ranks are started",
    "ranks size their cache",
    "serving",
    "streaming",
    "draining",
]
FLAGS = as_flags({**SMALL, "num_pages": 512, "max_num_seqs": 16})


def connect(running: Running, **options: int) -> socket.socket:
    raw = socket.socket()
    for name, value in options.items():
        raw.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    raw.settimeout(10)
    raw.connect(running.port.getsockname())
    return raw


def head_of(body: bytes, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode()


def is_closed(raw: socket.socket) -> bool:
    """Whether the server has closed it, without an answer."""
    try:
        return raw.recv(100) == b""
    except ConnectionResetError:
        return True


BODY = json.dumps({**COMPLETION, "max_tokens": 3}).encode()


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HTTP/1.1\r\nx: ", head_of(BODY), head_of(BODY) + BODY[:5]],
    ids=["nothing", "half a head", "no body", "half a body"],
)
def test_a_request_that_does_not_arrive_is_given_up(run: Callable[..., Running], sent: bytes) -> None:
    running = run(limits=ServerLimits(request_timeout_s=0.3))
    with connect(running) as raw:
        raw.sendall(sent)
        assert is_closed(raw)
    wait_until(lambda: not running.server.server_state.connections)


def test_half_a_request_behind_a_whole_one_is_given_up(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(request_timeout_s=0.3))
    for together in (True, False):
        with connect(running) as raw:
            whole, half = head_of(BODY) + BODY, head_of(BODY) + BODY[:5]
            raw.sendall(whole + half if together else whole)
            assert raw.recv(20).startswith(b"HTTP/1.1 200")
            if not together:
                raw.sendall(half)
            wait_until(lambda: not running.server.server_state.connections)


def test_an_answer_may_take_longer_than_a_request(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(request_timeout_s=0.2, response_timeout_s=0.2))
    fake(running).step_s = 0.1
    for stream in (False, True):
        answer = running.post("/v1/completions", {**COMPLETION, "max_tokens": 8, "stream": stream})
        assert answer.status_code == 200
        assert "length" in answer.text


def test_who_never_reads_is_cancelled_and_holds_little(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(response_timeout_s=0.5))
    service = fake(running)
    body = json.dumps({**COMPLETION, "prompt": [[5] * 400] * 16, "max_tokens": 100, "n": 8, "logprobs": 5,
                       "stream": True}).encode()  # fmt: skip
    with connect(running, SO_RCVBUF=4096) as raw:
        raw.sendall(head_of(body) + body)
        wait_until(lambda: bool(running.server.server_state.connections) and service.steps > 0)
        (connection,) = running.server.server_state.connections
        wait_until(lambda: not running.server.server_state.connections)
        assert connection.transport.get_write_buffer_size() == 0
    wait_until(lambda: service.live == 0)
    assert running.post("/v1/completions", COMPLETION).status_code == 200


def test_too_many_connections_are_refused_in_words(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(max_connections=3))
    silent = [connect(running) for _ in range(3)]
    wait_until(lambda: len(running.server.server_state.connections) == 3)
    response = running.http.get("/health")
    assert (response.status_code, error_of(response)["code"]) == (503, "busy")
    for raw in silent:
        raw.close()
    wait_until(lambda: not running.server.server_state.connections)
    assert running.http.get("/health").status_code == 200


@pytest.mark.process
def test_the_server_may_open_as_many_files_as_its_process_may() -> None:
    program = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
from lockstep.launch.server.http_protocol import RESERVED_FILES, max_connections, raise_file_limit
assert max_connections() == 300 - RESERVED_FILES
raise_file_limit()
assert max_connections() == hard - RESERVED_FILES
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_bodies_in_memory_are_bounded(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(max_bodies=2), max_body_bytes=100_000)
    waiting = [connect(running) for _ in range(2)]
    for raw in waiting:
        raw.sendall(head_of(b" " * 90_000) + b" " * 89_000)
    gateway_full = {**COMPLETION, "user": "x" * 50_000}
    wait_until(lambda: running.post("/v1/completions", gateway_full).status_code == 429)
    assert error_of(running.post("/v1/completions", gateway_full))["type"] == "rate_limit_error"
    assert running.post("/v1/completions", COMPLETION).status_code == 200, "a short one still goes"
    for raw in waiting:
        raw.close()
    wait_until(lambda: running.post("/v1/completions", gateway_full).status_code == 200)


def test_what_is_no_http_is_refused_in_the_envelope(run: Callable[..., Running]) -> None:
    running = run()
    for sent in (b"\x16\x03\x01 garbage\r\n\r\n", b"GET / HTTP\r\n\r\n", b"x" * 100_000):
        with connect(running) as raw:
            raw.sendall(sent)
            said = b""
            while piece := raw.recv(4096):
                said += piece
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["code"] == "invalid_request"


def script(name: str, *arguments: str) -> dict[str, Any]:
    """Return the JSON at the end of a script that must succeed."""
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.process
@pytest.mark.serial
@pytest.mark.parametrize(
    ("streams", "seconds", "requests"), [(12, 1, 4), pytest.param(24, 3, 8, marks=pytest.mark.soak)]
)
def test_streams_under_load_are_what_they_are_alone(streams: int, seconds: int, requests: int) -> None:
    """Also the daily start and end of `lockstep serve` with two ranks on a Ray cluster that it starts."""
    load = [f"--streams={streams}", f"--seconds={seconds}", f"--requests={requests}"]
    found = script("soak_server.py", *load, "--", "--tp=2", *FLAGS)
    assert found["streams"] >= streams


@pytest.mark.process
@pytest.mark.serial
def test_bad_requests_and_bad_clients() -> None:
    found = script("soak_nonsense.py", "--requests=650", "--clients=66", "--", *FLAGS)
    assert sum(found["statuses"].values()) == 650
    assert sum(found["clients"].values()) == 66
    assert found["after"]["descriptors"] <= found["before"]["descriptors"]


@pytest.mark.soak
@pytest.mark.serial
def test_starts_and_ends_leave_nothing() -> None:
    assert script("soak_starts.py", "--times=3", "--patience=15", "--", "--tp=2", *FLAGS)["ends"] == 3


@pytest.mark.process
@pytest.mark.serial
@pytest.mark.parametrize("phase", ["ranks load", *(pytest.param(p, marks=pytest.mark.soak) for p in PHASES)])
def test_signals_at_start_up_leave_nothing(phase: str) -> None:
    found = script(
        "soak_starts.py", "--signals", "--twice", "--patience=15", f"--phase={phase}", "--", "--tp=2", *FLAGS
    )
    assert found["ends"] == 2


@pytest.mark.process
@pytest.mark.serial
@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGTERM, 4, marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, 4, marks=pytest.mark.soak),
    ],
)
def test_a_signal_while_generate_imports_torch(number: int, times: int) -> None:
    """At another place of the import each time: it used to abort now and then."""
    for i in range(times):
        process = subprocess.Popen(
            [*COMMAND, "generate", "--device=cpu", "--prompt=x"], stderr=subprocess.PIPE, text=True
        )
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch_cpu" not in maps.read_text() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.1 * i)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
