"""Thousands of bad requests, and clients that break HTTP or disconnect, against `lockstep serve`.

    python scripts/soak/soak_nonsense.py --requests 10000 --clients 300 -- --tp 2 --device cpu

Every bad request must be answered with a 4xx in OpenAI's envelope. Then --clients clients send half a request, half a
body, garbage or endless headers, read half a stream or nothing, and disconnect. After each part, a golden request must
be answered byte for byte as before, no request may be live, and every page of the KV cache must be free.

Prints each fault. The last line is JSON: the statuses by kind of bad request, the clients by kind, `wrong`, the number
of faults, and `left`, the number of processes and files left after the end. `before` and `after` hold the descriptors,
threads and memory of the server. The exit status is 1 if there were faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from server_process import ServerProcess, wait

GOLDEN = {"prompt": "And the LORD said unto Moses", "max_tokens": 24, "temperature": 0.9, "seed": 3, "logprobs": 2}
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "parameters": SCHEMA}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "In the", "max_tokens": 2},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 2,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "required",
    },
    "/v1/responses": {"input": "Who?", "max_output_tokens": 2, "tools": [{"type": "function", **FUNCTION}]},
    "/v1/messages": {
        "model": "lockstep-demo",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 2,
        "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
    },
    "/tokenize": {"prompt": "In the"},
    "/detokenize": {"tokens": [5, 6]},
}
REQUIRED = {
    "/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input",
    "/v1/messages": "messages", "/detokenize": "tokens",
}  # fmt: skip
FIELDS = [
    "temperature", "top_p", "n", "max_tokens", "stop", "seed", "logit_bias", "logprobs", "stream", "top_k", "model",
    "tools", "tool_choice", "bad_words", "allowed_token_ids", "prompt_logprobs", "cache_salt", "truncate_prompt_tokens",
]  # fmt: skip
JSON = {"content-type": "application/json"}
NOT_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01", b"1_0", b"'1'", b"undefined")
Request = tuple[str, str, bytes, dict[str, str]]  # method, path, body, headers


def wrong_value(rng: random.Random, depth: int = 0) -> Any:
    """Return a value that no field takes."""
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return {"" if rng.random() < 0.1 else "a\x00b": None}
    if kind == 1:
        return [[None], {}]
    if kind == 2:
        return rng.choice([10**30, -(10**30), 2**63, -1e300, 1.5e308, -5])
    if kind == 3:
        return rng.choice(["", "\x00", "\ud7ff" * 3, "x" * 5000, "-1", "null", "\u202e", "\U0010ffff"]) + "\x00"
    if kind == 4:
        return rng.choice([[True, "x", 1.5, None], [-1], [2**40], [[[]]]])
    return {f"k{i}": wrong_value(rng, depth + 1) for i in range(rng.randrange(1, 4))}


def unknown_field(rng: random.Random, path: str) -> bytes:
    """Return a body with an unknown field."""
    return json.dumps(VALID[path] | {f"field{rng.randrange(10**6)}": wrong_value(rng)}).encode()


def wrong_type(rng: random.Random, path: str) -> bytes:
    """Return a body with a field of the wrong type."""
    if path.startswith("/v1"):
        return json.dumps(VALID[path] | {rng.choice(FIELDS): {"x": wrong_value(rng)}}).encode()
    return json.dumps(VALID[path] | {"model": {"x": wrong_value(rng)}}).encode()


def missing(rng: random.Random, path: str) -> bytes:
    """Return a body with a required field left out."""
    required = REQUIRED.get(path, "prompt")
    return json.dumps({k: v for k, v in VALID[path].items() if k != required}).encode()


def not_a_number(rng: random.Random, path: str) -> bytes:
    """Return a body with a number that JSON does not have."""
    return json.dumps(VALID[path] | {"max_tokens": "@"}).encode().replace(b'"@"', rng.choice(NOT_NUMBERS))


def nested(rng: random.Random, path: str) -> bytes:
    """Return deeply nested values."""
    depth = rng.choice([50, 1000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opening * depth + b"1" + closing * depth
    return (
        b"{" + b", ".join(b'"%b": %b' % (name, inner) for name in (b"prompt", b"messages", b"tokens", b"input")) + b"}"
    )


def invalid_utf8(rng: random.Random, path: str) -> bytes:
    """Return bytes that are not UTF-8."""
    text = json.dumps(VALID[path]).encode()
    at = text.index(b":") + 3
    return text[:at] + bytes(rng.choice([[0xFF], [0xC0, 0x80], [0xED, 0xA0, 0x80], [0xF5, 0x80]])) + text[at:]


def cut(rng: random.Random, path: str) -> bytes:
    """Return JSON that ends early."""
    text = json.dumps(VALID[path]).encode()
    return text[: rng.randrange(len(text))]


def flipped(rng: random.Random, path: str) -> bytes:
    """Return JSON with two wrong bytes."""
    text = bytearray(json.dumps(VALID[path]).encode())
    text[0] = rng.choice(b"[}x\x00\xfe")
    text[rng.randrange(1, len(text))] = rng.randrange(256)
    return bytes(text)


def other_json(rng: random.Random, path: str) -> bytes:
    """Return JSON that is not an object."""
    values = [b"null", b"[]", b'"x"', b"1", b"true", b"", b" ", b"\xef\xbb\xbf{}", b"[" + b"1," * 999 + b"1]"]
    return rng.choice(values)


def out_of_range(rng: random.Random, path: str) -> bytes:
    """Return a body with a number out of range."""
    huge = rng.choice([10**400, -(10**19), 2**64, 10**12, -7])
    name = rng.choice(["n", "max_tokens", "seed", "top_k"]) if abs(huge) > 2**63 or huge == -7 else "n"
    name = "n" if huge == -7 else name
    return json.dumps(
        VALID[path] | ({name: huge} if path.startswith("/v1") else {"tokens": [huge], "prompt": 5})
    ).encode()


MAKERS: list[Callable[[random.Random, str], bytes]] = [
    unknown_field, wrong_type, missing, not_a_number, nested, invalid_utf8, cut, flipped, other_json, out_of_range,
]  # fmt: skip


def bad_requests(num_requests: int, seed: int) -> Iterator[tuple[str, Request]]:
    """Yield different bad requests, each with the name of its fault."""
    rng = random.Random(seed)
    for i in range(num_requests):
        path = rng.choice(list(VALID))
        kind = i % (len(MAKERS) + 3)
        if kind < len(MAKERS):
            maker = MAKERS[kind]
            yield maker.__name__, ("POST", path, maker(rng, path), JSON)
        elif kind == len(MAKERS):
            types = ["text/plain", "application/xml", "", "multipart/form-data; boundary=x", "application/jsonx"]
            yield "content type", ("POST", path, json.dumps(VALID[path]).encode(), {"content-type": rng.choice(types)})
        elif kind == len(MAKERS) + 1:
            yield "method", (rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]), path, b"{}", JSON)
        else:
            odd = rng.choice(["/v1", "/v1/completions/", "/../etc/passwd", "/%00", "/v1/%2e%2e/x", "/" + "a" * 3000])
            yield "path", (rng.choice(["GET", "POST"]), odd, b"{}", JSON)


def send_bad_requests(client: httpx.Client, num_requests: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Send bad requests; returns the number of each status by kind of request, and the faults."""
    statuses, faults = Counter[str](), []
    for name, (method, path, body, headers) in bad_requests(num_requests, seed):
        try:
            response = client.request(method, path, content=body, headers=headers)
        except httpx.HTTPError as error:
            faults.append(f"{name}: {method} {path} {body[:80]!r}: {type(error).__name__}: {error}")
            continue
        statuses[f"{name} {response.status_code}"] += 1
        if not 400 <= response.status_code < 500 or not _is_in_envelope(response):
            faults.append(f"{name}: {method} {path[:40]} {body[:120]!r}: {response.status_code} {response.text[:200]}")
    return statuses, faults


def _is_in_envelope(response: httpx.Response) -> bool:
    try:
        error = response.json()["error"]
        is_anthropic = response.url.path.startswith("/v1/messages")
        is_error = set(error) == {"message", "type"} | (set() if is_anthropic else {"param", "code"})
    except (ValueError, KeyError, TypeError):
        return False
    return is_error and len(response.content) < 3000


# Clients that break HTTP or disconnect.

Client = Callable[[random.Random, socket.socket], None]


def request_bytes(path: str = "/v1/completions", **changes: Any) -> bytes:
    """Return a whole HTTP request for a stream."""
    body = json.dumps({"prompt": "In the", "max_tokens": 400, "ignore_eos": True, "stream": True} | changes).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def half_a_request(rng: random.Random, connection: socket.socket) -> None:
    """Send the beginning of a request."""
    request = request_bytes()
    connection.sendall(request[: rng.randrange(len(request))])


def half_a_stream(rng: random.Random, connection: socket.socket) -> None:
    """Read the beginning of a stream."""
    connection.sendall(request_bytes(n=rng.choice([1, 2])))
    connection.recv(rng.choice([1, 300, 4000]))


def never_reads(rng: random.Random, connection: socket.socket) -> None:
    """Start streams and read nothing."""
    connection.sendall(request_bytes(n=4, logprobs=5))
    time.sleep(rng.random())


def slow_headers(rng: random.Random, connection: socket.socket) -> None:
    """Send headers byte by byte."""
    for byte in b"GET /health HTTP/1.1\r\nx:":
        connection.send(bytes([byte]))
        time.sleep(0.02)


def endless_headers(rng: random.Random, connection: socket.socket) -> None:
    """Send a header of 500 kB."""
    connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x-%d: " % rng.randrange(99) + b"y" * 500_000)


def garbage(rng: random.Random, connection: socket.socket) -> None:
    """Send random bytes."""
    connection.sendall(rng.randbytes(rng.randrange(1, 3000)))


def garbage_behind(rng: random.Random, connection: socket.socket) -> None:
    """Send random bytes after a request."""
    connection.sendall(request_bytes(max_tokens=5) + request_bytes(max_tokens=5)[:50] + rng.randbytes(2000))
    connection.recv(100)


def pipelined(rng: random.Random, connection: socket.socket) -> None:
    """Send 30 requests at once."""
    connection.sendall(request_bytes(max_tokens=2) * 30)
    connection.recv(100)


def bad_chunks(rng: random.Random, connection: socket.socket) -> None:
    """Send a chunked body with an invalid length."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    connection.sendall(head + b'5\r\n{"pro\r\nZZZZ\r\n' + rng.randbytes(50))


def two_lengths(rng: random.Random, connection: socket.socket) -> None:
    """Send two content lengths."""
    connection.sendall(
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}{}{}"
    )


def long_body_that_stops(rng: random.Random, connection: socket.socket) -> None:
    """Send a part of a long body."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"content-length: 4000000\r\n\r\n"
    connection.sendall(head + b" " * 300_000)


CLIENTS: list[Client] = [
    half_a_request, half_a_stream, never_reads, slow_headers, endless_headers, garbage, garbage_behind, pipelined,
    bad_chunks, two_lengths, long_body_that_stops,
]  # fmt: skip


def run_clients(address: tuple[str, int], num_clients: int, seed: int) -> Counter[str]:
    """Run the clients, up to 50 at once; half of them end with a reset. Returns their number by kind."""

    def run_client(i: int) -> str:
        rng, client = random.Random(seed + i), CLIENTS[i % len(CLIENTS)]
        with socket.create_connection(address, timeout=20) as connection:
            try:
                client(rng, connection)
            except OSError:  # the server closed the connection first
                return f"{client.__name__}, closed"
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return client.__name__

    with ThreadPoolExecutor(50) as pool:
        return Counter(pool.map(run_client, range(num_clients)))


# The state of the server.


def golden_answer(client: httpx.Client) -> str:
    """Return the answer to the golden request, without the fields that differ each time."""
    answer = client.post("/v1/completions", json=GOLDEN).json()
    return json.dumps({k: v for k, v in answer.items() if k not in ("id", "created", "usage")})


def gauges(client: httpx.Client) -> dict[str, float]:
    """Return the values of /metrics by name, without labels."""
    lines = re.findall(r"^lockstep:(\w+)\{\S*\} (\S+)$", client.get("/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def held_resources(client: httpx.Client, num_pages: float) -> list[str]:
    """Return the requests and pages that an idle server still holds, after time to notice that clients left."""

    def find() -> list[str]:
        now = gauges(client)
        held = [f"{name}={now[name]:g}" for name in ("num_requests_running", "num_requests_waiting") if now[name]]
        free = now["kv_cache_free_pages"]
        return held if free == num_pages else [*held, f"free pages {free:g} of {num_pages:g}"]

    wait(lambda: not any("num" in name for name in find()), 30)
    client.post("/v1/completions", json=GOLDEN)  # a step updates the scheduler's count of free pages
    wait(lambda: not find(), 5)
    is_healthy = client.get("/health").status_code == 200
    return find() + ([] if is_healthy else ["not healthy"])


def usage(pid: int) -> dict[str, int]:
    """Return the descriptors, threads and MiB of memory of a process."""
    memory_kib = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")),
        "MiB": memory_kib // 1024,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="bad requests")
    parser.add_argument("--clients", type=int, default=300, help="clients that break HTTP or disconnect")
    parser.add_argument("--seed", type=int, default=0, help="seed of requests and clients")
    parser.add_argument("flags", nargs="*", help="flags of the server")
    options = parser.parse_args()
    server = ServerProcess(*options.flags)
    try:
        url = server.url()
        with httpx.Client(base_url=url, timeout=60) as client:
            golden = golden_answer(client)
            assert golden_answer(client) == golden
            num_pages, pid = gauges(client)["kv_cache_free_pages"], server.process.pid

            def check() -> list[str]:
                is_same = golden_answer(client) == golden
                return held_resources(client, num_pages) + ([] if is_same else ["another answer to the golden request"])

            before, started = usage(pid), time.monotonic()
            statuses, faults = send_bad_requests(client, options.requests, options.seed)
            seconds = time.monotonic() - started
            faults += check()
            parts = urlsplit(url)
            clients = run_clients((str(parts.hostname), int(parts.port or 0)), options.clients, options.seed)
            faults += check()
            wait(lambda: usage(pid)["descriptors"] <= before["descriptors"], 10)
            after = usage(pid)
        faults += [line for line in server.log().splitlines() if "Traceback" in line or "ERROR" in line]
        status = server.end()
        remains = server.remains(10)
    finally:
        server.kill()
    for fault in (faults + remains)[:30]:
        print("wrong:", fault)
    print(json.dumps({
        "requests": options.requests, "seconds": round(seconds, 1), "statuses": dict(sorted(statuses.items())),
        "clients": dict(sorted(clients.items())), "wrong": len(faults), "left": len(remains), "status": status,
        "before": before, "after": after,
    }))  # fmt: skip
    return 1 if faults or remains or status else 0


if __name__ == "__main__":
    sys.exit(main())
