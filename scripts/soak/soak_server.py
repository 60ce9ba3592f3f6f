"""Many streams at once against `lockstep serve`: none lost, none doubled, every one what the same request gives alone.

    python scripts/soak/soak_server.py --streams 256 --seconds 60 --idle 60 -- --tp 2 --device cpu

What follows `--` goes to the server, whose model is the demo model. First each of `--requests` different requests,
greedy and seeded, is answered alone. Then `--streams` clients ask for them in random order, one after the other, for
`--seconds`, and compare: text, number of tokens, one finish reason, one usage, one [DONE], nothing after it. Then
nothing happens for `--idle` seconds, and the CPU time of all processes is added up. The last line is JSON; status 1
says that a stream was wrong or that something was left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from serving import Serving, cpu_seconds, title

PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is", "The sons of", "Thou shalt not"]
PROGRAM = [str(Path(__file__).with_name("measured_serve.py"))]
WORDS = ["the", "king", "water", "house", "of", "and", "sons", "came", "land", "heart", "unto", "people", "children"]
STEP_S = 60.0  # without a byte of a stream, and it counts as lost


@dataclass(frozen=True)
class Answer:
    """A stream put together again; two of the same request are equal."""

    text: str
    tokens: int
    finish_reason: str


class Wrong(Exception):
    """A stream that is not what a stream must be."""


def bodies(number: int) -> list[bytes]:
    """Different requests: greedy and seeded, 16 to 160 tokens, every fourth with log-probabilities, some with a stop.

    Of words that the model knows: after others its logits are so nearly equal that rounding chooses.
    """
    chance = random.Random(0)
    found = []
    for i in range(number):
        body: dict[str, Any] = {
            "prompt": f"{PROMPTS[i % len(PROMPTS)]} {' '.join(chance.sample(WORDS, 3))}",
            "max_tokens": chance.randrange(16, 161), "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 0 if i % 3 == 0 else 0.9, "seed": i,
        }  # fmt: skip
        body |= {"logprobs": 0} if i % 4 == 0 else {}
        body |= {"stop": [" of", "Brs"]} if i % 5 == 0 else {}
        found.append(json.dumps(body).encode())
    return found


async def ask(where: tuple[str, int], body: bytes) -> tuple[Answer, str, int]:
    """Follow one stream on a connection of its own: the answer, its id, and the number of chunks."""
    reader, writer = await asyncio.open_connection(*where)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = await asyncio.wait_for(reader.readline(), STEP_S)
        if b" 200 " not in status:
            raise Wrong(f"{status!r}")
        lines = []
        while line := await asyncio.wait_for(reader.readline(), STEP_S):
            if line.startswith(b"data: "):
                lines.append(line[6:].strip())
        return read(lines)
    finally:
        writer.close()


def read(lines: list[bytes]) -> tuple[Answer, str, int]:
    if not lines or lines[-1] != b"[DONE]":
        raise Wrong(f"the stream was cut off after {len(lines)} events: {lines[-1:]}")
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    text, reasons, ids = "", [], {last.get("id")}
    for chunk in chunks:
        if "error" in chunk or reasons:
            raise Wrong(f"an event that should not be: {chunk}")
        (choice,) = chunk["choices"]
        text += choice["text"]
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        ids.add(chunk["id"])
    if len(reasons) != 1 or last["choices"] or len(ids) != 1:
        raise Wrong(f"finish reasons {reasons}, ids {ids}, at the end {last}")
    return Answer(text, last["usage"]["completion_tokens"], reasons[0]), last["id"], len(chunks)


async def alone(where: tuple[str, int], asked: list[bytes]) -> list[Answer]:
    return [(await ask(where, body))[0] for body in asked]


async def together(
    where: tuple[str, int], asked: list[bytes], wanted: list[Answer], streams: int, seconds: float
) -> Any:
    """Clients that ask without a pause, until the time is over; what they counted."""
    until, wrong, ids = time.monotonic() + seconds, [], Counter[str]()
    counts = Counter[str]()

    async def client(chance: random.Random) -> None:
        while time.monotonic() < until:
            which = chance.randrange(len(asked))
            try:
                found, own_id, chunks = await ask(where, asked[which])
            except (Wrong, OSError, ValueError, asyncio.TimeoutError) as error:
                wrong.append(f"request {which}: {type(error).__name__}: {error}")
                continue
            ids[own_id] += 1
            counts.update(streams=1, tokens=found.tokens, chunks=chunks)
            if found != wanted[which]:
                wrong.append(f"request {which}: {found} instead of {wanted[which]}")

    started = time.monotonic()
    await asyncio.gather(*(client(random.Random(i)) for i in range(streams)))
    wrong += [f"two streams with the id {own}" for own, times in ids.items() if times > 1]
    return counts, wrong, time.monotonic() - started


def idle(server: Serving, seconds: float) -> dict[str, float]:
    """Percent of a core that each process uses while nothing is asked."""
    pids = server.processes()
    before, started = {pid: cpu_seconds(pid) for pid in pids}, time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - started
    used = Counter[str]()
    for pid, command in pids.items():
        used[title(command)] += 100 * (cpu_seconds(pid) - before[pid]) / took
    return dict(used.most_common())


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)} if values else {}


def measured(path: Path, window: tuple[float, float]) -> dict[str, Any]:
    """Of the tokens that went out within the window; the clock is the machine's."""
    found = json.loads(path.read_text())
    inside = [window[0] <= at <= window[1] for at in found["at"]]
    names = ("to_loop_us", "to_socket_us")
    return {name: percentiles([v for v, is_in in zip(found[name], inside, strict=True) if is_in]) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--idle", type=float, default=0)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    times = Path(tempfile.mkdtemp(prefix="soak-")) / "times.json"
    server = Serving(*options.flags, program=PROGRAM, MEASURED_TIMES=str(times))
    try:
        url = urlsplit(server.url())
        where, asked = (str(url.hostname), int(url.port or 0)), bodies(options.requests)
        wanted = asyncio.run(alone(where, asked))
        pid, load = server.process.pid, os.getloadavg()[0]
        begun, cpu = time.perf_counter(), cpu_seconds(pid)
        counts, wrong, took = asyncio.run(together(where, asked, wanted, options.streams, options.seconds))
        window, cpu = (begun, time.perf_counter()), cpu_seconds(pid) - cpu
        used = idle(server, options.idle) if options.idle else {}
        status = server.end()
        left = server.left(10)
    finally:
        server.kill()
    for line in wrong[:20]:
        print("wrong:", line)
    for line in left:
        print("left:", line)
    print(json.dumps({
        "concurrent": options.streams, "seconds": round(took, 1), **counts, "wrong": len(wrong), "left": len(left),
        "status": status, "tokens_per_s": round(counts["tokens"] / took), "load_before": load,
        "front_end_cpu_us_per_token": round(1e6 * cpu / max(1, counts["tokens"]), 1), **measured(times, window),
        "idle_percent_of_a_core": {name: round(percent, 2) for name, percent in used.items()},
        "idle_total": round(sum(used.values()), 2),
    }))  # fmt: skip
    return 1 if wrong or left or status else 0


if __name__ == "__main__":
    sys.exit(main())
