"""Bad requests by the thousand, and clients that misbehave on the wire, against `lockstep serve`.

    python scripts/soak/soak_nonsense.py --requests 10000 --clients 300 -- --tp 2 --device cpu

Every answer to a bad request must be a 4xx in OpenAI's envelope. Then come clients that send half a request, half a
body, garbage after a request, endless headers, that read half a stream, or nothing at all, and vanish. After each part
a golden request must be answered byte for byte as before, nothing may be live and every page free (the scheduler's own
account). The last line is JSON; status 1 says that something was not so.
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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from serving import Serving, wait

GOLDEN = {"prompt": "And the LORD said unto Moses", "max_tokens": 24, "temperature": 0.9, "seed": 3, "logprobs": 2}
GOOD = {
    "/v1/completions": {"prompt": "In the", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2},
    "/tokenize": {"prompt": "In the"},
    "/detokenize": {"tokens": [5, 6]},
}
NEEDED = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/detokenize": "tokens"}
KNOWN = [
    "temperature",
    "top_p",
    "n",
    "max_tokens",
    "stop",
    "seed",
    "logit_bias",
    "logprobs",
    "stream",
    "top_k",
    "model",
]
JSON = {"content-type": "application/json"}
NOT_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"0x10", b"01", b"1_0", b"'1'", b"undefined")
Bad = tuple[str, str, bytes, dict[str, str]]  # method, path, body, headers


def wrong_value(chance: random.Random, depth: int = 0) -> Any:
    """A value that no field of these names takes."""
    kind = chance.randrange(7 if depth < 3 else 5)
    if kind == 0:
        return {"" if chance.random() < 0.1 else "a\x00b": None}
    if kind == 1:
        return [[None], {}]
    if kind == 2:
        return chance.choice([10**30, -(10**30), 2**63, -1e300, 1.5e308, -5])
    if kind == 3:
        return chance.choice(["", "\x00", "\ud7ff" * 3, "x" * 5000, "-1", "null", "\u202e", "\U0010ffff"]) + "\x00"
    if kind == 4:
        return chance.choice([[True, "x", 1.5, None], [-1], [2**40], [[[]]]])
    return {f"k{i}": wrong_value(chance, depth + 1) for i in range(chance.randrange(1, 4))}


def unknown_field(chance: random.Random, path: str) -> bytes:
    return json.dumps(GOOD[path] | {f"field{chance.randrange(10**6)}": wrong_value(chance)}).encode()


def wrong_type(chance: random.Random, path: str) -> bytes:
    if path in ("/v1/completions", "/v1/chat/completions"):
        return json.dumps(GOOD[path] | {chance.choice(KNOWN): {"x": wrong_value(chance)}}).encode()
    return json.dumps(GOOD[path] | {"model": {"x": wrong_value(chance)}}).encode()


def missing(chance: random.Random, path: str) -> bytes:
    needed = NEEDED.get(path, "prompt")
    return json.dumps({k: v for k, v in GOOD[path].items() if k != needed}).encode()


def not_a_number(chance: random.Random, path: str) -> bytes:
    return json.dumps(GOOD[path] | {"max_tokens": "@"}).encode().replace(b'"@"', chance.choice(NOT_NUMBERS))


def nested(chance: random.Random, path: str) -> bytes:
    depth = chance.choice([50, 1000, 100_000])
    opening, closing = chance.choice([(b"[", b"]"), (b'{"a":', b"}")])
    inner = opening * depth + b"1" + closing * depth
    return b'{"prompt": ' + inner + b', "messages": ' + inner + b', "tokens": ' + inner + b"}"


def invalid_utf8(chance: random.Random, path: str) -> bytes:
    text = json.dumps(GOOD[path]).encode()
    at = text.index(b":") + 3
    return text[:at] + bytes(chance.choice([[0xFF], [0xC0, 0x80], [0xED, 0xA0, 0x80], [0xF5, 0x80]])) + text[at:]


def cut(chance: random.Random, path: str) -> bytes:
    text = json.dumps(GOOD[path]).encode()
    return text[: chance.randrange(len(text))]


def flipped(chance: random.Random, path: str) -> bytes:
    """A brace or a quotation mark is replaced: that is no JSON any more."""
    text = bytearray(json.dumps(GOOD[path]).encode())
    text[0] = chance.choice(b"[}x\x00\xfe")
    text[chance.randrange(1, len(text))] = chance.randrange(256)
    return bytes(text)


def other_json(chance: random.Random, path: str) -> bytes:
    return chance.choice(
        [b"null", b"[]", b'"x"', b"1", b"true", b"", b" ", b"\xef\xbb\xbf{}", b"[" + b"1," * 999 + b"1]"]
    )


def out_of_range(chance: random.Random, path: str) -> bytes:
    huge = chance.choice([10**400, -(10**19), 2**64, 10**12, -7])
    name = chance.choice(["n", "max_tokens", "seed", "top_k"]) if abs(huge) > 2**63 or huge == -7 else "n"
    name = "n" if huge == -7 else name
    return json.dumps(
        GOOD[path] | ({name: huge} if path.startswith("/v1") else {"tokens": [huge], "prompt": 5})
    ).encode()


MAKERS: list[Callable[[random.Random, str], bytes]] = [
    unknown_field, wrong_type, missing, not_a_number, nested, invalid_utf8, cut, flipped, other_json, out_of_range,
]  # fmt: skip


def bad_requests(number: int, seed: int) -> Iterator[tuple[str, Bad]]:
    """Different each time, and each with the name of what is wrong with it."""
    chance = random.Random(seed)
    for i in range(number):
        path = chance.choice(list(GOOD))
        which = i % (len(MAKERS) + 3)
        if which < len(MAKERS):
            maker = MAKERS[which]
            yield maker.__name__, ("POST", path, maker(chance, path), JSON)
        elif which == len(MAKERS):
            kind = chance.choice(
                ["text/plain", "application/xml", "", "multipart/form-data; boundary=x", "application/jsonx"]
            )
            yield "content type", ("POST", path, json.dumps(GOOD[path]).encode(), {"content-type": kind})
        elif which == len(MAKERS) + 1:
            yield "method", (chance.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]), path, b"{}", JSON)
        else:
            odd = chance.choice(["/v1", "/v1/completions/", "/../etc/passwd", "/%00", "/v1/%2e%2e/x", "/" + "a" * 3000])
            yield "path", (chance.choice(["GET", "POST"]), odd, b"{}", JSON)


def send_bad(client: httpx.Client, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    statuses, wrong = Counter[str](), []
    for name, (method, path, body, headers) in bad_requests(number, seed):
        try:
            answer = client.request(method, path, content=body, headers=headers)
        except httpx.HTTPError as error:
            wrong.append(f"{name}: {method} {path} {body[:80]!r}: {type(error).__name__}: {error}")
            continue
        statuses[f"{name} {answer.status_code}"] += 1
        if not 400 <= answer.status_code < 500 or not _in_envelope(answer):
            wrong.append(f"{name}: {method} {path[:40]} {body[:120]!r}: {answer.status_code} {answer.text[:200]}")
    return statuses, wrong


def _in_envelope(answer: httpx.Response) -> bool:
    try:
        return set(answer.json()["error"]) == {"message", "type", "param", "code"} and len(answer.content) < 3000
    except (ValueError, KeyError, TypeError):
        return False


# -- clients on the wire

Client = Callable[[random.Random, socket.socket], None]


def request(path: str = "/v1/completions", **changes: Any) -> bytes:
    body = json.dumps({"prompt": "In the", "max_tokens": 400, "ignore_eos": True, "stream": True} | changes).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def half_a_request(chance: random.Random, wire: socket.socket) -> None:
    whole = request()
    wire.sendall(whole[: chance.randrange(len(whole))])


def half_a_stream(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(request(n=chance.choice([1, 2])))
    wire.recv(chance.choice([1, 300, 4000]))


def never_reads(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(request(n=4, logprobs=5))
    time.sleep(chance.random())


def slow_headers(chance: random.Random, wire: socket.socket) -> None:
    for byte in b"GET /health HTTP/1.1\r\nx:":
        wire.send(bytes([byte]))
        time.sleep(0.02)


def endless_headers(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(b"GET /health HTTP/1.1\r\n" + b"x-%d: " % chance.randrange(99) + b"y" * 500_000)


def garbage(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(chance.randbytes(chance.randrange(1, 3000)))


def garbage_behind(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(request(max_tokens=5) + request(max_tokens=5)[:50] + chance.randbytes(2000))
    wire.recv(100)


def pipelined(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(request(max_tokens=2) * 30)
    wire.recv(100)


def bad_chunks(chance: random.Random, wire: socket.socket) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    wire.sendall(head + b'5\r\n{"pro\r\nZZZZ\r\n' + chance.randbytes(50))


def two_lengths(chance: random.Random, wire: socket.socket) -> None:
    wire.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}{}{}")


def long_body_that_stops(chance: random.Random, wire: socket.socket) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4000000\r\n\r\n"
    wire.sendall(head + b" " * 300_000)


CLIENTS: list[Client] = [
    half_a_request, half_a_stream, never_reads, slow_headers, endless_headers, garbage, garbage_behind, pipelined,
    bad_chunks, two_lengths, long_body_that_stops,
]  # fmt: skip


def storm(where: tuple[str, int], clients: int, seed: int) -> Counter[str]:
    """So many clients, up to 50 at once; half of them end with a reset."""
    from concurrent.futures import ThreadPoolExecutor

    def visit(i: int) -> str:
        chance, client = random.Random(seed + i), CLIENTS[i % len(CLIENTS)]
        with socket.create_connection(where, timeout=20) as wire:
            try:
                client(chance, wire)
            except OSError:  # the server has closed first
                return f"{client.__name__}, closed"
            if chance.random() < 0.5:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return client.__name__

    with ThreadPoolExecutor(50) as pool:
        return Counter(pool.map(visit, range(clients)))


# -- what must be as before


def answer(client: httpx.Client) -> str:
    found = client.post("/v1/completions", json=GOLDEN).json()
    return json.dumps({k: v for k, v in found.items() if k not in ("id", "created", "usage")})


def gauges(client: httpx.Client) -> dict[str, float]:
    """Of /metrics, without their labels."""
    return {
        name: float(v) for name, v in re.findall(r"^lockstep:(\w+)\{\S*\} (\S+)$", client.get("/metrics").text, re.M)
    }


def at_rest(client: httpx.Client, pages: float) -> list[str]:
    """What is held although nobody asks for anything; waits for clients that have gone to be noticed."""

    def held() -> list[str]:
        now = gauges(client)
        wrong = [f"{n}={now[n]:g}" for n in ("num_requests_running", "num_requests_waiting") if now[n]]
        return wrong + (
            [f"free pages {now['kv_cache_free_pages']:g} of {pages:g}"] if now["kv_cache_free_pages"] != pages else []
        )

    wait(lambda: not any("num" in what for what in held()), 30)
    client.post("/v1/completions", json=GOLDEN)  # a step, with which the scheduler tells its account
    wait(lambda: not held(), 5)
    healthy = client.get("/health").status_code == 200
    return held() + ([] if healthy else ["not healthy"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    server = Serving(*options.flags)
    try:
        url = server.url()
        with httpx.Client(base_url=url, timeout=60) as client:
            golden = answer(client)
            assert answer(client) == golden
            pages, pid = gauges(client)["kv_cache_free_pages"], server.process.pid
            before = used(pid)
            started = time.monotonic()
            statuses, wrong = send_bad(client, options.requests, options.seed)
            seconds = time.monotonic() - started
            wrong += at_rest(client, pages) + (
                [] if answer(client) == golden else ["another answer after bad requests"]
            )
            parts = urlsplit(url)
            clients = storm((str(parts.hostname), int(parts.port or 0)), options.clients, options.seed)
            wrong += at_rest(client, pages) + ([] if answer(client) == golden else ["another answer after the storm"])
            wait(lambda: used(pid)["descriptors"] <= before["descriptors"], 10)
            after = used(pid)
        said = server.said()
        wrong += [line for line in said.splitlines() if "Traceback" in line or "ERROR" in line]
        status = server.end()
        left = server.left(10)
    finally:
        server.kill()
    for line in (wrong + left)[:30]:
        print("wrong:", line)
    print(json.dumps({
        "requests": options.requests, "seconds": round(seconds, 1), "statuses": dict(sorted(statuses.items())),
        "clients": dict(sorted(clients.items())), "wrong": len(wrong), "left": len(left), "status": status,
        "before": before, "after": after,
    }))  # fmt: skip
    return 1 if wrong or left or status else 0


def used(pid: int) -> dict[str, int]:
    """Descriptors, threads and MiB of memory of the front end."""
    memory = int(re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0])
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "threads": len(os.listdir(f"/proc/{pid}/task")),
        "MiB": memory // 1024,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
