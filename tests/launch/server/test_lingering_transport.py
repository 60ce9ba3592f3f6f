"""The ends of connections: every client reads its refusal, and none keeps a connection or the server for long."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import pytest
import requests

from lockstep.launch.server import http_protocol, lingering_transport
from lockstep.launch.server.server_config import ServerLimits

from fake_engine import Running, fake
from waiting import PATIENCE_S, join, read_to_end, wait_until

NUM_BYTES = 20_000_000  # more than the buffers of both sides
HEADERS = {"content-type": "application/json", "connection": "close"}
GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


def pieces() -> Iterator[bytes]:
    return (b" " * 100_000 for _ in range(NUM_BYTES // 100_000))


def by_http_client(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    connection.request("POST", path, pieces(), headers | {"content-length": str(NUM_BYTES)})
    with connection.getresponse() as response:
        response.read()
    connection.close()
    return response.status


def by_http_client_in_chunks(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    connection.request("POST", path, pieces(), headers | {"transfer-encoding": "chunked"}, encode_chunked=True)
    with connection.getresponse() as response:
        response.read()
    connection.close()
    return response.status


def by_urllib(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    request = urllib.request.Request(f"{url}{path}", b" " * NUM_BYTES, headers)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    refusal.value.close()
    return refusal.value.code


def by_requests(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    return requests.post(f"{url}{path}", data=b" " * NUM_BYTES, headers=headers, timeout=60).status_code


def by_requests_in_chunks(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    return requests.post(f"{url}{path}", data=pieces(), headers=headers, timeout=60).status_code


def by_httpx(url: httpx.URL, path: str, headers: dict[str, str]) -> int:
    return httpx.post(f"{url}{path}", content=pieces(), headers=headers, timeout=60).status_code


CLIENTS = (by_http_client, by_http_client_in_chunks, by_urllib, by_requests, by_requests_in_chunks, by_httpx)


@pytest.fixture(params=["uvloop", pytest.param("asyncio", marks=pytest.mark.nightly)])
def serve(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Running]
) -> Callable[..., Running]:
    """A function that starts a server on one of the event loops, which refuses bodies of more than 10,000 bytes."""
    if request.param == "asyncio":
        monkeypatch.setitem(sys.modules, "uvloop", None)
    return lambda **options: run(max_body_bytes=10_000, **options)


def connect(running: Running, sent: bytes) -> socket.socket:
    raw = socket.create_connection(running.port.getsockname(), timeout=60)
    raw.sendall(sent)
    return raw


def post(headers: str, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{headers}\r\n\r\n".encode()


def send_until_reset(raw: socket.socket) -> None:
    """Send a byte at a time until that fails."""
    until = time.monotonic() + PATIENCE_S
    with suppress(ConnectionError):
        while time.monotonic() < until:
            raw.sendall(b" ")
            time.sleep(0.02)
        raise AssertionError(f"the server still reads after {PATIENCE_S:g} s")


def statuses(received: bytes) -> list[int]:
    return [int(line.split()[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@pytest.mark.parametrize("client", CLIENTS)
def test_client_reads_a_refusal_that_comes_before_its_body(
    run: Callable[..., Running], caplog: pytest.LogCaptureFixture, client: Callable[..., int]
) -> None:
    """The path is unknown, or the body is too long; with and without Connection: close of the client."""
    running = run(max_body_bytes=10_000)
    for headers in ({"content-type": "application/json"}, HEADERS):
        assert client(httpx.URL(running.url), "/unknown", headers) == 404
        assert client(httpx.URL(running.url), "/v1/completions", headers) == 413
    assert caplog.records == []


@pytest.mark.process
@pytest.mark.parametrize("options", [["--header", "expect: 100-continue"], ["--header", "expect:"], ["--http1.0"]])
def test_curl_reads_a_refusal(run: Callable[..., Running], options: list[str]) -> None:
    running = run(max_body_bytes=10_000)
    command = ["curl", "--silent", "--show-error", "--data-binary", "@-", "--header", "content-type: application/json"]
    urls = [f"{running.url}/v1/completions", f"{running.url}/unknown"]  # one after the other
    ended = subprocess.run(
        [*command, *options, "--write-out", "\n%{http_code}\n", *urls], input=b" " * NUM_BYTES, capture_output=True,
        timeout=60,
    )  # fmt: skip
    assert [int(line) for line in ended.stdout.splitlines()[1::2]] == [413, 404], ended.stderr


def test_slow_client_reads_its_refusal(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_transport, "QUIET_S", 1.0)
    with connect(serve(), post("content-length: 150000")) as raw:
        for _ in range(30):
            time.sleep(0.05)
            raw.sendall(b" " * 5000)
        received = read_to_end(raw)
    assert statuses(received) == [413]
    assert b"connection: close" in received.lower()


def test_silent_client_is_closed(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_transport, "QUIET_S", 0.2)
    running = serve()
    with connect(running, post("content-length: 100000")) as raw:
        assert statuses(read_to_end(raw)) == [413]
        assert len(running.server.server_state.connections) == 1
        wait_until(lambda: not running.server.server_state.connections)


def test_refused_body_has_a_deadline(serve: Callable[..., Running]) -> None:
    running = serve(limits=ServerLimits(response_timeout_s=0.5))
    with connect(running, post("content-length: 100000")) as raw:
        send_until_reset(raw)
    wait_until(lambda: not running.server.server_state.connections)


def test_refused_body_has_a_limit(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_transport, "MAX_DROPPED_BYTES", 100_000)
    running = serve()
    with connect(running, post(f"content-length: {10**9}")) as raw, pytest.raises(ConnectionError):
        raw.sendall(b" " * 10**8)
    wait_until(lambda: not running.server.server_state.connections)


def test_client_that_does_not_read_has_a_deadline(serve: Callable[..., Running]) -> None:
    running = serve(limits=ServerLimits(response_timeout_s=0.5))
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(running.port.getsockname())
        raw.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" * 50)
        wait_until(lambda: bool(running.server.server_state.connections))
        wait_until(lambda: not running.server.server_state.connections)


def test_rest_of_a_body_without_chunks_is_read(serve: Callable[..., Running]) -> None:
    head = post("transfer-encoding: chunked")
    with connect(serve(), head + b"3e8\r\n" + b" " * 1000 + b"\r\n{}" + b" " * NUM_BYTES) as raw:
        assert statuses(read_to_end(raw)) == [400]


def test_refusal_of_a_whole_request_keeps_the_connection(shared: Running) -> None:
    request = post("content-length: 2", "/unknown") + b"{}"
    with connect(shared, request) as raw:
        first = raw.recv(1 << 16)
        raw.sendall(request)
        second = raw.recv(1 << 16)
    assert statuses(first) == statuses(second) == [404]
    assert b"connection" not in first.lower()


def test_body_that_waits_for_100_continue_is_not_read_as_a_request(run: Callable[..., Running]) -> None:
    running = run(max_body_bytes=10_000)
    with connect(running, post("expect: 100-continue\r\ncontent-length: 20000")) as raw:
        received = read_to_end(raw)
        assert statuses(received) == [413]
        assert b"connection: close" in received.lower()
        raw.sendall(GET_HEALTH)
        with suppress(ConnectionResetError):
            assert raw.recv(100) == b"", "this is not read as a request"


def test_refusal_before_100_continue_is_the_only_answer(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    with connect(shared, post("expect: 100-continue\r\ntransfer-encoding: chunked") + b"no length") as raw:
        assert statuses(read_to_end(raw)) == [400]
    assert caplog.records == []


def test_data_after_the_last_request_is_dropped(run: Callable[..., Running]) -> None:
    """A client may send an empty line after a body; nothing may follow a request with Connection: close."""
    running = run()
    fake(running).step_s = 0.05
    body = json.dumps({"prompt": "In the", "max_tokens": 4}).encode()
    request = post(f"connection: close\r\ncontent-length: {len(body)}") + body
    for together in (request + b"\r\n" + GET_HEALTH, request):
        with connect(running, together) as raw:
            wait_until(lambda: fake(running).live == 1)
            raw.sendall(b"\r\n" + GET_HEALTH)
            assert statuses(read_to_end(raw)) == [200]


def test_data_after_the_last_request_has_a_limit(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering_transport, "MAX_DROPPED_BYTES", 1000)
    running = serve()
    fake(running).paused = True
    body = b'{"prompt": "In the", "max_tokens": 4}'
    with connect(running, post(f"connection: close\r\ncontent-length: {len(body)}") + body) as raw:
        wait_until(lambda: fake(running).live == 1)
        raw.sendall(b" " * 2000)
        wait_until(lambda: not running.server.server_state.connections and fake(running).live == 0)


def test_client_beyond_the_limit_of_connections_reads_its_refusal(serve: Callable[..., Running]) -> None:
    running = serve(limits=ServerLimits(max_connections=1))
    with connect(running, b""):
        wait_until(lambda: len(running.server.server_state.connections) == 1)
        with connect(running, post("content-length: 10000000") + b" " * 10_000_000) as raw:
            assert statuses(read_to_end(raw)) == [503]


def test_connections_far_beyond_the_limit_do_not_linger(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "MAX_EXCESS", 2)
    running = run(limits=ServerLimits(max_connections=1))
    clients = [connect(running, b"") for _ in range(10)]
    assert [statuses(read_to_end(client)) for client in clients[1:]] == [[503]] * 9
    wait_until(lambda: len(running.server.server_state.connections) == 3)
    for client in clients:
        client.close()


LATE = post("content-length: 100000")
STATES = {
    "refused": (LATE, 413),
    "not arrived": (post("content-length: 9000") + b" ", 503),
    "half a head": (LATE[:-2], 503),
    "answered": (post("content-length: 9000", "/health"), 405),
}


@pytest.mark.parametrize("state", STATES)
def test_server_ends_while_a_client_sends(
    serve: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    if state != "refused":  # one state has the time that users wait
        monkeypatch.setattr(http_protocol, "SHUTDOWN_LINGER_S", 0.3)
    running, (sent, status) = serve(), STATES[state]
    received: list[bytes] = []
    with connect(running, sent) as raw:
        wait_until(lambda: len(running.server.server_state.connections) == 1)
        reader = threading.Thread(target=lambda: received.append(read_to_end(raw)))
        reader.start()
        time.sleep(0.1)  # the refusal has been sent, if the state has one
        started = time.monotonic()
        running.server.handle_exit(signal.SIGTERM, None)
        send_until_reset(raw)
        join(running.thread)
        assert time.monotonic() - started < 30  # far below the response_timeout_s of 60 s
        join(reader)
    assert statuses(received[0]) == [status]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_idle_connection_does_not_linger(serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering_transport, "QUIET_S", 60.0)
    monkeypatch.setattr(http_protocol, "SHUTDOWN_LINGER_S", 60.0)
    running = serve()
    running.server.config.timeout_graceful_shutdown = 60
    with connect(running, GET_HEALTH) as raw:
        assert statuses(raw.recv(1 << 16)) == [200]
        running.server.handle_exit(signal.SIGTERM, None)
        join(running.thread, 30)
