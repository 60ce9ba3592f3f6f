"""Many concurrent streams against `lockstep serve`: every stream must equal the response to the same request alone.

Completions, chats with a required tool, and the same chats in the Responses and the Messages API are mixed.

    python scripts/soak/soak_server.py --streams 256 --seconds 60 --idle 60 -- --tp 2 --device cpu

Flags after `--` go to the server, which serves the demo model. First, each of --requests different requests, greedy
and seeded, is answered alone. Then --streams clients send them in random order for --seconds. Each stream must have
the same text and number of tokens, one id, one finish reason, one usage and one [DONE] at the end. Then the server is
idle for --idle seconds.

Prints each fault. The last line is JSON: streams, tokens and chunks; `wrong` and `left`, the numbers of wrong streams
and of processes and files left after the end; CPU time and, from measured_serve.py, the percentiles of the latencies;
and the CPU time of each process while idle, in percent of a core. The exit status is 1 if there were faults.
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
from server_process import ServerProcess, cpu_seconds, short_name

PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is", "The sons of", "Thou shalt not"]
PROGRAM = [str(Path(__file__).with_name("measured_serve.py"))]
WORDS = ["the", "king", "water", "house", "of", "and", "sons", "came", "land", "heart", "unto", "people", "children"]
LINE_S = 60.0  # longest wait for a line of a stream
MODEL = "lockstep-demo"
CHAT_PATHS = {5: "/v1/chat/completions", 6: "/v1/responses", 7: "/v1/messages"}  # by number of a request, modulo 8
SCHEMA = {
    "type": "object", "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit", "days"], "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One request."""

    path: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """The content of a stream; equal for equal requests."""

    text: str  # of a chat: its text and the arguments of its calls
    tokens: int
    finish_reason: str


class WrongStream(Exception):
    """A stream that breaks the protocol."""


def make_requests(num_requests: int) -> list[Call]:
    """Return different requests: greedy and seeded, 16 to 160 tokens, some with log-probabilities or stop strings.

    The prompts have words that the model knows. After unknown words its logits are so close that rounding decides.
    """
    rng = random.Random(0)
    calls = []
    for i in range(num_requests):
        if i % 8 in CHAT_PATHS:
            calls.append(make_chat(CHAT_PATHS[i % 8], i, " ".join(rng.sample(WORDS, 3))))
            continue
        body: dict[str, Any] = {
            "prompt": f"{PROMPTS[i % len(PROMPTS)]} {' '.join(rng.sample(WORDS, 3))}",
            "max_tokens": rng.randrange(16, 161), "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 0 if i % 3 == 0 else 0.9, "seed": i,
        }  # fmt: skip
        body |= {"logprobs": 0} if i % 4 == 0 else {}
        body |= {"stop": [" of", "Brs"]} if i % 5 == 0 else {}
        calls.append(Call("/v1/completions", json.dumps(body).encode()))
    return calls


def make_chat(path: str, number: int, words: str) -> Call:
    """Return a chat with a tool that the model must call."""
    body: dict[str, Any] = {"model": MODEL, "stream": True, "temperature": 0.9 if number % 3 else 0}
    question = [{"role": "user", "content": f"{PROMPTS[number % len(PROMPTS)]} {words}"}]
    if path == "/v1/messages":
        tool = {"name": "place", "input_schema": SCHEMA}
        body |= {"messages": question, "max_tokens": 60, "tools": [tool], "tool_choice": {"type": "any"}}
        body["temperature"] = 0  # this API has no seed
    elif path == "/v1/responses":
        tool = {"type": "function", "name": "place", "parameters": SCHEMA}
        body |= {"input": question, "max_output_tokens": 60, "tools": [tool], "tool_choice": "required", "seed": number}
    else:
        tool = {"type": "function", "function": {"name": "place", "parameters": SCHEMA}}
        body |= {"messages": question, "max_tokens": 60, "tools": [tool], "tool_choice": "required", "seed": number}
        body["stream_options"] = {"include_usage": True}
    return Call(path, json.dumps(body).encode())


async def stream(address: tuple[str, int], call: Call) -> tuple[Answer, str, int]:
    """Read one stream on a new connection; returns the answer, its id, and the number of chunks."""
    body = call.body
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = f"POST {call.path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        status = await asyncio.wait_for(reader.readline(), LINE_S)
        if b" 200 " not in status:
            raise WrongStream(f"{status!r}")
        lines = []
        while line := await asyncio.wait_for(reader.readline(), LINE_S):
            if line.startswith(b"data: "):
                lines.append(line[6:].strip())
        return PARSERS[call.path](lines)
    finally:
        writer.close()


def parse(lines: list[bytes]) -> tuple[Answer, str, int]:
    """Return the answer, its id and the number of chunks; raises WrongStream."""
    if not lines or lines[-1] != b"[DONE]":
        raise WrongStream(f"the stream was cut off after {len(lines)} events: {lines[-1:]}")
    *chunks, last = [json.loads(line) for line in lines[:-1]]
    text, reasons, ids = "", [], {last.get("id")}
    for chunk in chunks:
        if "error" in chunk or reasons:
            raise WrongStream(f"an unexpected event: {chunk}")
        (choice,) = chunk["choices"]
        text += choice["text"] if "text" in choice else text_of_delta(choice["delta"])
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        ids.add(chunk["id"])
    if len(reasons) != 1 or last["choices"] or len(ids) != 1:
        raise WrongStream(f"finish reasons {reasons}, ids {ids}, at the end {last}")
    return Answer(text, last["usage"]["completion_tokens"], reasons[0]), last["id"], len(chunks)


def text_of_delta(delta: dict[str, Any]) -> str:
    calls = (call["function"].get("arguments", "") for call in delta.get("tool_calls", ()))
    return (delta.get("content") or "") + "".join(calls)


def parse_response(lines: list[bytes]) -> tuple[Answer, str, int]:
    """Do as `parse` for the Responses API."""
    events = [json.loads(line) for line in lines]
    last = events[-1] if events else {}
    if last.get("type") not in ("response.completed", "response.incomplete"):
        raise WrongStream(f"the stream was cut off after {len(events)} events: {last}")
    numbers = [event["sequence_number"] for event in events]
    if numbers != list(range(len(events))):
        raise WrongStream(f"the numbers of the events are {numbers}")
    text = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    response = last["response"]
    return Answer(text, response["usage"]["output_tokens"], response["status"]), response["id"], len(events)


def parse_message(lines: list[bytes]) -> tuple[Answer, str, int]:
    """Do as `parse` for the Messages API."""
    events = [json.loads(line) for line in lines]
    if len(events) < 3 or events[-1]["type"] != "message_stop" or events[0]["type"] != "message_start":
        raise WrongStream(f"the stream was cut off after {len(events)} events: {events[-1:]}")
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    text = "".join(delta.get("partial_json") or delta.get("text") or "" for delta in deltas)
    end = events[-2]
    answer = Answer(text, end["usage"]["output_tokens"], end["delta"]["stop_reason"])
    return answer, events[0]["message"]["id"], len(events)


PARSERS = {
    "/v1/completions": parse, "/v1/chat/completions": parse, "/v1/responses": parse_response,
    "/v1/messages": parse_message,
}  # fmt: skip


async def answer_alone(address: tuple[str, int], requests: list[Call]) -> list[Answer]:
    """Return the answers to the requests, sent one after the other."""
    return [(await stream(address, body))[0] for body in requests]


async def run_clients(
    address: tuple[str, int], requests: list[Call], answers: list[Answer], num_clients: int, seconds: float
) -> tuple[Counter[str], list[str], float]:
    """Let clients send requests without a pause; returns the counts, the faults and the seconds."""
    deadline, faults, ids = time.monotonic() + seconds, [], Counter[str]()
    counts = Counter[str]()

    async def run_client(rng: random.Random) -> None:
        while time.monotonic() < deadline:
            number = rng.randrange(len(requests))
            try:
                answer, stream_id, num_chunks = await stream(address, requests[number])
            except (WrongStream, OSError, ValueError, asyncio.TimeoutError) as error:
                faults.append(f"request {number}: {type(error).__name__}: {error}")
                continue
            ids[stream_id] += 1
            counts.update(streams=1, tokens=answer.tokens, chunks=num_chunks)
            if answer != answers[number]:
                faults.append(f"request {number}: {answer} instead of {answers[number]}")

    started = time.monotonic()
    await asyncio.gather(*(run_client(random.Random(i)) for i in range(num_clients)))
    faults += [f"two streams with the id {stream_id}" for stream_id, times in ids.items() if times > 1]
    return counts, faults, time.monotonic() - started


def measure_idle(server: ServerProcess, seconds: float) -> dict[str, float]:
    """Return the CPU time of each process of an idle server, in percent of a core."""
    pids = server.processes()
    before, started = {pid: cpu_seconds(pid) for pid in pids}, time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    percent = Counter[str]()
    for pid, command in pids.items():
        percent[short_name(command)] += 100 * (cpu_seconds(pid) - before[pid]) / elapsed
    return dict(percent.most_common())


def latencies(path: Path, start: float, stop: float) -> dict[str, Any]:
    """Return percentiles of the latencies of measured_serve.py, for tokens sent between two times of perf_counter."""
    measured = json.loads(path.read_text())
    inside = [start <= sent_at <= stop for sent_at in measured["at"]]
    names = ("to_loop_us", "to_socket_us")
    return {name: percentiles([v for v, use in zip(measured[name], inside, strict=True) if use]) for name in names}


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 90th and 99th percentile."""
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)} if values else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256, help="concurrent clients")
    parser.add_argument("--seconds", type=float, default=60, help="duration of the load")
    parser.add_argument("--requests", type=int, default=96, help="different requests")
    parser.add_argument("--idle", type=float, default=0, help="seconds without load, to measure the CPU time")
    parser.add_argument("flags", nargs="*", help="flags of the server")
    options = parser.parse_args()
    times = Path(tempfile.mkdtemp(prefix="soak-")) / "times.json"
    server = ServerProcess(*options.flags, program=PROGRAM, MEASURED_TIMES=str(times))
    try:
        url = urlsplit(server.url())
        address, requests = (str(url.hostname), int(url.port or 0)), make_requests(options.requests)
        answers = asyncio.run(answer_alone(address, requests))
        pid, load = server.process.pid, os.getloadavg()[0]
        start, cpu_before = time.perf_counter(), cpu_seconds(pid)
        counts, faults, seconds = asyncio.run(run_clients(address, requests, answers, options.streams, options.seconds))
        stop, cpu_s = time.perf_counter(), cpu_seconds(pid) - cpu_before
        idle_percent = measure_idle(server, options.idle) if options.idle else {}
        status = server.end()
        remains = server.remains(10)
    finally:
        server.kill()
    for fault in faults[:20]:
        print("wrong:", fault)
    for name in remains:
        print("left:", name)
    print(json.dumps({
        "concurrent": options.streams, "seconds": round(seconds, 1), **counts, "wrong": len(faults),
        "left": len(remains), "status": status, "tokens_per_s": round(counts["tokens"] / seconds), "load_before": load,
        "front_end_cpu_us_per_token": round(1e6 * cpu_s / max(1, counts["tokens"]), 1),
        **latencies(times, start, stop),
        "idle_percent_of_a_core": {name: round(percent, 2) for name, percent in idle_percent.items()},
        "idle_total": round(sum(idle_percent.values()), 2),
    }))  # fmt: skip
    return 1 if faults or remains or status else 0


if __name__ == "__main__":
    sys.exit(main())
