"""Innocent clients of `lockstep serve` beside clients that send the most expensive requests in a loop.

    python scripts/soak/soak_attacks.py --seconds 10 --attackers 8 -- --device cpu

--attackers clients send each kind of request. Before each attack, and after the last one, the same is measured without
attackers: an attack is compared with the calm times before and after it. Three kinds of clients measure: one calls
/health, one reads streams, --innocents others send short prompts. The attackers run at the lowest priority, as if on
another machine, and have another address than the others: the server is fair between addresses.

Prints a line for each attack: latencies in milliseconds, the worst gap within a stream, p99 and the p99 of gaps in
those without the attack, the statuses of innocent clients and attackers, and the memory of the server. The last line
is JSON. The exit status is 1 if an innocent request was not answered with 200, or if its p99 is above --factor times
that without the attack.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server_process import ServerProcess

LONG = 4_100_000  # characters
SHORT = {"prompt": "Moses.", "max_tokens": 4, "temperature": 0}
STREAM = {"prompt": "And it came to pass", "max_tokens": 200, "ignore_eos": True, "stream": True}
INNOCENT = "127.0.0.1"  # address of innocent clients
USER = {"role": "user", "content": ""}
UNIQUE = "777777777"  # another number takes its place in each request
SLOW_RULES = 's: s s s s | "a" | "b" |'  # an ambiguous grammar
SLOW_PATTERN = ".*a.{18}b"
Body = tuple[str, bytes]  # path and JSON


def body(path: str, **fields: Any) -> Body:
    return path, json.dumps(fields, separators=(",", ":")).encode()


def long_words(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(1, 12))) for _ in range(LONG // 8))


def attacks() -> dict[str, Body]:
    """Return the most expensive request of each kind."""
    words = long_words(random.Random(1))
    completion, chat = "/v1/completions", "/v1/chat/completions"
    many = {"n": 128, "max_tokens": 200, "temperature": 1}
    return {
        "one prompt of a letter": body(completion, prompt="a" * LONG),
        "one prompt of words": body(completion, prompt=words),
        "prompts of 4,000 characters": body(completion, prompt=[words[i : i + 4000] for i in range(0, 512_000, 4000)]),
        "1,000 prompts": body(completion, prompt=[words[i : i + 4000] for i in range(0, 4_000_000, 4000)]),
        "prompts of one letter": body(completion, prompt=["a"] * 900_000),
        "token ids": body(completion, prompt=[1] * 2_000_000),
        "lists of token ids": body(completion, prompt=[[1]] * 1_000_000),
        "one long message": body(chat, messages=[USER | {"content": words}]),
        "messages": body(chat, messages=[USER] * 120_000),
        "text parts": body(chat, messages=[USER | {"content": [{"type": "text", "text": ""}] * 120_000}]),
        "tokenize": body("/tokenize", prompt=words, return_token_strs=True),
        "detokenize": body("/detokenize", tokens=[999] * 1_000_000),
        "logit_bias": body(completion, prompt="a", logit_bias={str(i): 1000 for i in range(300_000)}),
        "unknown fields": body(completion, prompt="a", **{str(i): 1 for i in range(300_000)}),
        "nested lists": body(completion, prompt="a", x=[[[]]] * 500_000),
        "a schema": body(completion, prompt="a", guided_json={str(i): {} for i in range(300_000)}),
        "echo of log-probabilities": body(
            completion, prompt=[[i % 2000 for i in range(1900)]] * 8, echo=True, logprobs=20, max_tokens=1
        ),
        "long prompts": body(
            completion, prompt=[[i % 2000 for i in range(j, j + 1900)] for j in range(128)], max_tokens=1
        ),
        "long outputs": body(completion, prompt=[[5]] * 4, n=128, max_tokens=1000, ignore_eos=True),
        "many outputs": body(
            completion, prompt=[[5]] * 8, n=64, max_tokens=8, logprobs=20, logit_bias={str(i): 1 for i in range(1000)}
        ),
        "an invalid request": body(completion, prompt="a", max_tokens=-1),
        "an unknown route": body("/nothing"),
        "short prompts": body(completion, prompt="a", max_tokens=1),
        "an ambiguous grammar": body(completion, prompt="a", guided_grammar=lark(SLOW_RULES), **many),
        "a slow pattern": body(completion, prompt="a", guided_regex=SLOW_PATTERN, **many),
        "ambiguous grammars": body(completion, prompt="a", guided_grammar=lark(SLOW_RULES) + f"\n// {UNIQUE}", **many),
        "slow patterns": body(completion, prompt="a", guided_regex=f"{SLOW_PATTERN}{UNIQUE}", **many),
        "large patterns": body(completion, prompt="a", guided_regex=f"([a-z]{{1,900}}x){{900}}{UNIQUE}"),
    }


def lark(rules: str) -> str:
    return f"start: s\n{rules}"


def attack(url: str, request: Body, sources: list[str], seconds: float, statuses: Queue[Counter[str]]) -> None:
    """Send the request from each address in a loop; the counts of the statuses go to `statuses`."""
    os.nice(19)
    counts: Counter[str] = Counter()
    deadline, numbers = time.monotonic() + seconds, itertools.count(100_000_000)
    path, content = request

    def send(source: str) -> None:
        while (left_s := deadline - time.monotonic()) > 0:
            unique = content.replace(UNIQUE.encode(), str(next(numbers)).encode())
            try:
                counts[str(post(url, (path, unique), source, timeout_s=left_s)[0])] += 1
            except OSError as error:
                counts[type(error).__name__] += 1

    run_threads([partial(send, source) for source in sources])
    statuses.put(counts)


def run_threads(targets: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def post(url: str, request: Body, source: str = INNOCENT, timeout_s: float = 120) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a request from the address `source`."""
    path, content = request
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s, source_address=(source, 0))
    try:
        connection.request("POST", path, content, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Measurement:
    """The latencies of innocent clients over some seconds."""

    def __init__(self, url: str, num_innocents: int, seconds: float) -> None:
        self._url, self._deadline = url, time.monotonic() + seconds
        self.latencies: list[float] = []  # of short prompts, in seconds
        self.health: list[float] = []
        self.gaps: list[float] = []  # between the events of a stream
        self.statuses: Counter[str] = Counter()
        run_threads([self._watch_health, self._read_streams, *[self._send_prompts] * num_innocents])

    def _send_prompts(self) -> None:
        request = body("/v1/completions", **SHORT)
        while time.monotonic() < self._deadline:
            started = time.monotonic()
            try:
                self.statuses[str(post(self._url, request)[0])] += 1
            except OSError as error:
                self.statuses[type(error).__name__] += 1
            self.latencies.append(time.monotonic() - started)
            time.sleep(0.02)

    def _watch_health(self) -> None:
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=120)
        while time.monotonic() < self._deadline:
            started = time.monotonic()
            connection.request("GET", "/health")
            connection.getresponse().read()
            self.health.append(time.monotonic() - started)
            time.sleep(0.01)

    def _read_streams(self) -> None:
        path, content = body("/v1/completions", **STREAM)
        while time.monotonic() < self._deadline:
            connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=120)
            connection.request("POST", path, content, {"content-type": "application/json"})
            response = connection.getresponse()
            last: float | None = None
            while response.readline():
                now = time.monotonic()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
            connection.close()

    def result(self) -> dict[str, Any]:
        """Return the figures in milliseconds."""
        return {
            "p50": percentile(self.latencies, 0.5), "p99": percentile(self.latencies, 0.99),
            "worst": percentile(self.latencies, 1), "worst_health": percentile(self.health, 1),
            "p99_gap": percentile(self.gaps, 0.99), "worst_gap": percentile(self.gaps, 1),
            "innocent": dict(self.statuses),
        }  # fmt: skip


def percentile(seconds: list[float], quantile: float) -> float:
    """Return a quantile in milliseconds; nan without values."""
    ordered = sorted(seconds)
    return round(1e3 * ordered[min(len(ordered) - 1, int(quantile * len(ordered)))], 1) if ordered else float("nan")


def memory_mib(server: ServerProcess) -> int:
    """Return the resident memory of the server's processes in MiB."""
    pages = 0
    for pid in server.processes():
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:  # the process has ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def measure(url: str, request: Body | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the innocent clients, during an attack if there is a `request`."""
    context = multiprocessing.get_context("spawn")
    statuses: Queue[Counter[str]] = context.Queue()
    sources = [f"127.0.1.{1 + i % options.addresses}" for i in range(options.attackers)]
    arguments = (url, request, sources, options.seconds + 2, statuses)
    attackers = context.Process(target=attack, args=arguments, daemon=True)
    if request is not None:
        attackers.start()
        time.sleep(1)
    figures = Measurement(url, options.innocents, options.seconds).result()
    if request is not None:
        figures["attackers"] = dict(statuses.get())
        attackers.join()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each attack")
    parser.add_argument("--attackers", type=int, default=8, help="attacking clients")
    parser.add_argument("--innocents", type=int, default=4, help="innocent clients")
    parser.add_argument("--only", action="append", help="only attacks with this text in their name; repeat for several")
    parser.add_argument("--addresses", type=int, default=1, help="addresses of the attackers; the server shares fairly")
    parser.add_argument("--factor", type=float, default=3, help="highest p99 of innocent clients, in calm ones")
    parser.add_argument("flags", nargs="*", help="flags of the server")
    options = parser.parse_args()
    server = ServerProcess(*options.flags)
    figures: dict[str, dict[str, Any]] = {}
    try:
        url = server.url()
        post(url, body("/v1/completions", **SHORT))
        chosen = [(k, v) for k, v in attacks().items() if not options.only or any(text in k for text in options.only)]
        calm = measure(url, None, options)
        print(f"none: {calm}", flush=True)
        for name, request in chosen:
            during = measure(url, request, options)
            before, calm = calm, measure(url, None, options)
            mean = {f"calm_{key}": round((before[key] + calm[key]) / 2, 1) for key in ("p99", "p99_gap")}
            figures[name] = during | mean | {"memory_mib": memory_mib(server)}
            print(f"{name}: {figures[name]}", flush=True)
    finally:
        server.kill()
    wrong = [name for name, f in figures.items() if f["p99"] > options.factor * f["calm_p99"]]
    wrong += [name for name, f in figures.items() if set(f["innocent"]) != {"200"}]
    print(json.dumps({"wrong": wrong, **figures}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
