"""The limits, keys and options of the server over a scripted engine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import openai
import pytest

from lockstep.launch.server.server_config import ServerConfig
from lockstep.launch.server.server_socket import allow_reuse, bind

from fake_engine import CHAT_BODY, COMPLETION, KEY, Running, error_of, fake
from listeners import free_port
from waiting import join, wait_until


def test_limits_are_flags(run: Callable[..., Running]) -> None:
    running = run(max_input_tokens=10, max_total_tokens=20, max_n=2, max_stop_strings=1, max_client_batch_size=2,
                  max_logprobs=1)  # fmt: skip
    for changes in (
        {"prompt": [5] * 11}, {"prompt": [5] * 10, "max_tokens": 11}, {"n": 3}, {"stop": ["a", "b"]},
        {"prompt": ["a"] * 3}, {"logprobs": 2},
    ):  # fmt: skip
        response = running.post("/v1/completions", COMPLETION | changes)
        assert response.status_code == 400, changes
    allowed = {"prompt": [[5] * 10] * 2, "max_tokens": 10, "n": 2, "stop": ["a"], "logprobs": 1}
    assert running.post("/v1/completions", COMPLETION | allowed).status_code == 200


@pytest.mark.parametrize(("options", "busy"), [({"max_concurrent_requests": 2}, 2), ({"max_queued": 0}, 8)])
def test_excess_requests_get_429(run: Callable[..., Running], options: dict[str, int], busy: int) -> None:
    running = run(**options)
    service = fake(running)
    service.paused = True
    threads = [threading.Thread(target=running.post, args=("/v1/completions", COMPLETION)) for _ in range(busy)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.live == busy)
    response = running.post("/v1/completions", COMPLETION)
    assert response.status_code == 429
    assert error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        running.openai.chat.completions.create(**cast(Any, CHAT_BODY))
    service.paused = False
    for thread in threads:
        join(thread)
    assert running.post("/v1/completions", COMPLETION).status_code == 200, "places are given back"
    service.waiting = 2000  # in the engine, when the KV cache is full
    assert running.post("/v1/completions", COMPLETION).status_code == 429


def test_long_bodies_get_413(run: Callable[..., Running]) -> None:
    running = run(max_body_bytes=10_000)
    assert running.post("/v1/completions", COMPLETION | {"user": "x" * 9000}).status_code == 200
    response = running.post("/v1/completions", COMPLETION | {"user": "x" * 10_000})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")

    with socket.create_connection(running.port.getsockname(), timeout=60) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        raw.sendall(b"transfer-encoding: chunked\r\n\r\n" + (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 11)
        assert raw.recv(100).startswith(b"HTTP/1.1 413"), "without a content-length, and before the end"


def test_long_headers_get_400(shared: Running) -> None:
    with socket.create_connection(shared.port.getsockname(), timeout=60) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_keys(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY, "other"])
    routes = ["/v1/models", "/version", "/metrics", "/openapi.json", "/nothing"]
    for path in routes:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            response = running.http.get(path, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert running.http.get(path, headers={"authorization": "Bearer other"}).status_code in (200, 404)
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert running.post(path, {}).status_code == 401
    assert running.http.get("/health").status_code == 200
    assert running.openai.models.list().data
    with pytest.raises(openai.AuthenticationError):
        running.openai.with_options(api_key="wrong").models.list()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port=70000 must be between 0 and 65535"),
        ({"max_n": 129}, "max_n=129 must be between 1 and 128"),
        ({"max_logprobs": 21}, "max_logprobs=21 must be between 0 and 20"),
        ({"max_stop_strings": 17}, "max_stop_strings=17"),
        ({"max_body_bytes": 0}, "max_body_bytes=0 must be at least 1"),
        ({"drain_timeout": -1.0}, "drain_timeout=-1.0"),
        ({"drain_timeout": float("nan")}, "drain_timeout=nan"),
        ({"api_key": [""]}, "an empty api_key"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**options)


def test_port_in_use_is_refused(shared: Running) -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1 port .* in use; choose another --port$"):
        bind(ServerConfig(port=shared.port.getsockname()[1]))
    for host in ("no such host", "a..b", "a" * 100):
        with pytest.raises(ValueError, match=f"^host='{host}' is not an address to listen on"):
            bind(ServerConfig(host=host))
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1 .*; choose another --host$"):
        bind(ServerConfig(host="192.0.2.1"))


def test_port_is_taken_before_it_listens() -> None:
    with bind(ServerConfig(port=free_port())) as first, bind(ServerConfig(port=0)) as other:
        port = first.getsockname()[1]
        assert port != other.getsockname()[1]
        with pytest.raises(ValueError, match="in use"):
            bind(ServerConfig(port=port))
        allow_reuse(first)
        first.listen()
        with pytest.raises(ValueError, match="in use"):
            bind(ServerConfig(port=port))
        with socket.create_connection(first.getsockname()):
            first.accept()[0].close()  # it leaves the port in TIME_WAIT
    bind(ServerConfig(port=port)).close()


def test_tcp_nodelay_is_set(shared: Running) -> None:
    with socket.create_connection(shared.port.getsockname()):
        wait_until(lambda: bool(shared.server.server_state.connections))
        for connection in shared.server.server_state.connections:
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "40 ms an answer otherwise"
