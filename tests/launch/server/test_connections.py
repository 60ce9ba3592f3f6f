"""Events of a connection: half-closed clients, refused bodies, HEAD, and the hosts and origins of browsers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import httpx
import pytest

from lockstep.launch.server import http_protocol
from lockstep.launch.server.server_config import ServerConfig

from fake_engine import COMPLETION, KEY, Running, error_of, fake
from waiting import read_to_end, wait_until

GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
GET_ROUTES = ("/health", "/metrics", "/v1/models", "/version", "/stats", "/openapi.json", "/", "/page.css")


def request_of(body: dict[str, object]) -> bytes:
    content = json.dumps({**COMPLETION, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + content


def exchange(running: Running, sent: bytes) -> bytes:
    """Send, close this side, and return everything that comes back."""
    with socket.create_connection(running.port.getsockname(), timeout=60) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        return read_to_end(raw)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_half_closed_client_gets_its_answer(run: Callable[..., Running], stream: bool) -> None:
    running = run()
    fake(running).step_s = 0.05  # the answer takes longer than the first probes
    received = exchange(running, request_of({"max_tokens": 5, "stream": stream, "seed": 3}))
    expected = running.post("/v1/completions", {**COMPLETION, "max_tokens": 5, "seed": 3}).json()["choices"][0]["text"]
    if stream:
        assert received.count(b"data: ") == 6
        assert b"data: [DONE]" in received
    else:
        assert json.loads(received.rpartition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected
    assert fake(running).cancelled == []


def test_half_closed_client_may_pipeline_and_use_http_1_0(shared: Running) -> None:
    get = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    assert exchange(shared, get * 3).count(b'{"version"') == 3
    assert exchange(shared, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_client_that_is_gone_is_still_cancelled(run: Callable[..., Running], stream: bool) -> None:
    running = run()
    fake(running).step_s = 0.05
    with socket.create_connection(running.port.getsockname()) as raw:
        raw.sendall(request_of({"max_tokens": 400, "stream": stream}))
        wait_until(lambda: fake(running).live == 1)
    wait_until(lambda: fake(running).live == 0)
    assert len(fake(running).cancelled) == 1
    assert fake(running).steps < 100


def test_body_that_breaks_the_protocol_is_answered_once(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
    for content_type in ("", "content-type: application/json\r\n"):  # refused at once, and while the body is read
        received = exchange(shared, f"{head}{content_type}\r\nno length\r\n".encode())
        assert received.startswith(b"HTTP/1.1 400")
        assert received.count(b"HTTP/1.1") == 1
    assert [record for record in caplog.records if record.exc_info] == []


CHUNKED = "content-type: application/json\r\ntransfer-encoding: chunked\r\n"


@pytest.mark.parametrize(
    "head",
    [f"POST / HTTP/1.1\r\nhost: x\r\n{CHUNKED}content-length: 3", f"POST / HTTP/1.0\r\n{CHUNKED}x: y",
     f"HEAD / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n{CHUNKED}x: y"],
    ids=["two lengths", "HTTP/1.0", "HEAD"],
)  # fmt: skip
def test_ambiguous_length_of_a_body_is_refused(shared: Running, caplog: pytest.LogCaptureFixture, head: str) -> None:
    """Behind a proxy that reads the other length, the rest of the body would be a request of somebody else."""
    smuggled = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(shared.port.getsockname(), timeout=60) as raw:
        raw.sendall(f"{head}\r\n\r\n".encode() + b"0\r\n\r\n" + smuggled)
        received = read_to_end(raw)
    assert received.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in received.lower()
    assert received.count(b"\r\n\r\n") == 1, "the rest is not read as a request"
    assert [record for record in caplog.records if record.exc_info] == []


def test_refusal_of_a_half_closed_client_is_not_probed(
    shared: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "PROBE_S", (0.01, 0.01))
    head = f"POST / HTTP/1.1\r\nhost: localhost\r\n{CHUNKED}content-length: 3\r\n\r\n0\r\n\r\n"
    for _ in range(10):  # the end of the client's side may come before the second request is looked at, which drops it
        assert exchange(shared, GET_HEALTH + head.encode()).startswith(b"HTTP/1.1 200")
    time.sleep(0.1)  # several probes
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("before", [b"", GET_HEALTH], ids=["first", "pipelined"])
@pytest.mark.parametrize("body", [b'{"model": ', b"no length", b"5 x", b"5\r\n12345\r\n\x00"])
def test_chunk_without_length_is_refused_at_once(shared: Running, body: bytes, before: bytes) -> None:
    with socket.create_connection(shared.port.getsockname(), timeout=60) as raw:
        raw.sendall(before + f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{CHUNKED}\r\n".encode() + body)
        received = read_to_end(raw)
    assert b"HTTP/1.1 400" in received


def test_part_of_a_pipelined_request_keeps_the_connection(run: Callable[..., Running]) -> None:
    running = run()
    running.server.config.timeout_keep_alive = 0.05  # type: ignore[assignment]
    with socket.create_connection(running.port.getsockname(), timeout=60) as raw:
        raw.sendall(GET_HEALTH + GET_HEALTH[:8])
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
        time.sleep(0.3)
        raw.sendall(GET_HEALTH[8:])
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert raw.recv(1 << 16) == b"", "an idle connection is closed"


def test_chunks_may_come_in_pieces(shared: Running) -> None:
    content = request_of({"max_tokens": 2}).partition(b"\r\n\r\n")[2]
    chunks = b"%X;a=b\r\n%b\r\n1 \r\n%b\r\n0\r\nx-sum: 1\r\n\r\n" % (len(content) - 1, content[:-1], content[-1:])
    with socket.create_connection(shared.port.getsockname(), timeout=60) as raw:
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{CHUNKED}\r\n".encode())
        for byte in chunks:
            raw.sendall(bytes([byte]))
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_request_to_upgrade_is_served_without_a_warning(shared: Running, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    assert shared.http.get("/version", headers=headers).status_code == 200
    assert caplog.records == []


def test_stream_of_http_1_0_has_no_chunks(shared: Running) -> None:
    request = request_of({"max_tokens": 5, "stream": True, "seed": 3})
    head, _, body = exchange(shared, request.replace(b"HTTP/1.1", b"HTTP/1.0", 1)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    events = body.decode().split("\n\n")
    assert [event[:6] for event in events] == ["data: "] * 6 + [""]
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:5]]
    whole = shared.post("/v1/completions", {**COMPLETION, "max_tokens": 5, "seed": 3})
    assert "".join(texts) == whole.json()["choices"][0]["text"]


def test_half_request_is_dropped(shared: Running) -> None:
    assert exchange(shared, request_of({})[:-5]) == b""


@pytest.mark.parametrize("path", GET_ROUTES)
def test_head_is_get_without_body(shared: Running, path: str) -> None:
    head, get = shared.http.head(path), shared.http.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/stats"):  # they change
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_needs_a_route_and_a_key(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY])
    assert running.http.head("/health").status_code == 200
    assert running.http.head("/v1/models").status_code == 401
    authorized = {"authorization": f"Bearer {KEY}"}
    assert running.http.head("/v1/models", headers=authorized).status_code == 200
    assert running.http.head("/v1/completions", headers=authorized).status_code == 405
    assert running.http.head("/nothing", headers=authorized).status_code == 404


LOOPBACK = ["localhost", "LOCALHOST:80", "127.0.0.1", "127.3.2.1:8000", "[::1]", "[::1]:8000", "localhost.", "[0:0::1]"]
OTHERS = ["evil.com", "evil.com:8000", "localhost.evil.com", "127.0.0.1.evil.com", "evil.com@localhost", "[::2]", "",
          "localhost:8000:80", "192.168.0.1", "0.0.0.0", "127.0.0.1/", "[::1", "2130706433"]  # fmt: skip


def test_other_hosts_are_refused_on_loopback(shared: Running) -> None:
    for path in ("/", "/health", "/v1/models"):
        for host in LOOPBACK:
            assert shared.http.get(path, headers={"host": host}).status_code == 200, host
        for host in OTHERS:
            response = shared.http.get(path, headers={"host": host})
            assert (response.status_code, error_of(response)["code"]) == (403, "host_not_allowed"), host
            assert response.headers["x-request-id"]
    assert "evil.com" in error_of(shared.http.get("/", headers={"host": "evil.com"}))["message"]
    long = shared.http.get("/", headers={"host": "x" * 5000})
    assert long.status_code == 403


def test_allowed_hosts(run: Callable[..., Running]) -> None:
    running = run(allowed_hosts=["LLM.example.com", "10.0.0.5"], api_key=[KEY])
    for host in ("llm.example.com", "LLM.example.com:443", "10.0.0.5:8000", "localhost"):
        assert running.http.get("/health", headers={"host": host}).status_code == 200, host
    assert running.http.get("/health", headers={"host": "evil.com"}).status_code == 403
    assert run(allowed_hosts=["*"]).http.get("/health", headers={"host": "evil.com"}).status_code == 200


def test_all_hosts_are_served_beyond_loopback(run: Callable[..., Running]) -> None:
    running = run(host="0.0.0.0")
    assert running.http.get("/health", headers={"host": "llm.example.com"}).status_code == 200
    named = run(host="0.0.0.0", allowed_hosts=["llm.example.com"])
    assert named.http.get("/health", headers={"host": "evil.com"}).status_code == 403


def preflight(running: Running, origin: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST",
               "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    return running.http.options("/v1/chat/completions", headers=headers)


def test_cors_is_off_by_default(shared: Running) -> None:
    assert preflight(shared, "https://a.example").status_code == 405
    response = shared.http.get("/v1/models", headers={"origin": "https://a.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_cors_origins(run: Callable[..., Running]) -> None:
    running = run(cors_origins=["https://a.example"], api_key=[KEY])
    allowed = preflight(running, "https://a.example")
    assert allowed.status_code == 200, "a preflight carries no key"
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert preflight(running, "https://b.example").status_code == 400
    for key, status in ((KEY, 200), ("wrong", 401)):  # scripts may read the error too
        headers = {"origin": "https://a.example", "authorization": f"Bearer {key}"}
        response = running.post("/v1/completions", COMPLETION, headers=headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://a.example"
    other = running.post("/v1/completions", COMPLETION, headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    evil = running.http.options("/v1/models", headers={"host": "evil.com", "origin": "https://a.example"})
    assert evil.status_code == 403


@pytest.mark.parametrize("origin", ["example.com", "https://a.example/", "https://a.example/path", "null", ""])
def test_invalid_cors_origins_are_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        ServerConfig(cors_origins=[origin])
