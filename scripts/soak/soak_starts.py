"""`lockstep serve` started and ended over and over, and cut short in every phase of its life: nothing may be left.

    python scripts/soak/soak_starts.py --times 50 -- --tp 2 --device cpu
    python scripts/soak/soak_starts.py --signals -- --tp 2 --device cpu

The first starts, serves a request and ends each time. The second sends Ctrl-C (to the whole session, as a terminal
does) and SIGTERM in each phase, twice in a row with `--twice`. After each end there must be none of its processes and
nothing new in /dev/shm or the folder for temporary files, within `--patience` seconds. The last line is JSON; status 1
says that something was left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from serving import END_S, Serving, wait

BODY = {"prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
ENDLESS = {"prompt": "In the beginning", "max_tokens": 1900, "ignore_eos": True, "stream": True}
BAD_WORDS = ("Traceback", "Fatal Python error", "terminate called", "core dumped")
Phase = Callable[[Serving], bool]


def log_says(text: str) -> Phase:
    return lambda server: text in server.said()


def has_process(title: str) -> Phase:
    return lambda server: any(title in command for command in server.processes().values())


def has_loaded(library: str) -> Phase:
    """While the process imports it: its code is mapped, and little has happened since."""

    def holds(server: Serving) -> bool:
        try:
            return library in Path(f"/proc/{server.process.pid}/maps").read_text()
        except OSError:
            return False

    return holds


PHASES: dict[str, Phase] = {
    "the interpreter starts": lambda server: True,
    "torch is imported": has_loaded("libtorch_cpu"),
    "Ray is imported": has_loaded("_raylet"),
    "Ray's first server is there": has_process("gcs_server"),
    "Ray's node is there": has_process("/raylet/raylet"),
    "Ray's agents are there": has_process("dashboard/agent.py"),
    "ranks are started": log_says("Ray cluster"),
    "ranks load": has_process("ray::Worker.load"),
    "ranks size their cache": has_process("ray::Worker.allocate"),
    "serving": log_says("on http://"),
    "streaming": log_says("on http://"),
    "draining": log_says("on http://"),
}


def serve_once(flags: list[str]) -> tuple[Serving, int]:
    """Start, one request, an orderly end."""
    server = Serving(*flags)
    try:
        answer = httpx.post(server.url() + "/v1/completions", json=BODY, timeout=60)
        answer.raise_for_status()
        return server, server.end()
    except BaseException:
        server.kill()
        raise


def cut_short(flags: list[str], phase: str, number: int, twice: bool) -> tuple[Serving, int]:
    """Start, and send the signal once the phase is reached; the status."""
    server = Serving(*flags, "--drain-timeout=1")
    try:
        wait(lambda: PHASES[phase](server) or server.process.poll() is not None, END_S)
        client = _stream(server) if phase in ("streaming", "draining") else None
        if phase == "draining":
            _send(server, number)
            wait(lambda: "draining" in server.said(), 5)
        _send(server, number)
        if twice:
            time.sleep(0.2)
            _send(server, number)
        status = server.process.wait(END_S)
        if client is not None:
            client.close()
        return server, status
    except BaseException:
        server.kill()
        raise


def _send(server: Serving, number: int) -> None:
    if server.process.poll() is None:
        (os.killpg if number == signal.SIGINT else os.kill)(server.process.pid, number)


def _stream(server: Serving) -> httpx.Client:
    """A client in the middle of a stream."""
    client = httpx.Client(base_url=server.url(), timeout=60)
    response = client.send(client.build_request("POST", "/v1/completions", json=ENDLESS), stream=True)
    next(response.iter_lines())
    return client


def check(what: str, server: Serving, status: int, patience_s: float) -> list[str]:
    """What is wrong after this end."""
    started = time.monotonic()
    found = server.left(patience_s)
    waited = time.monotonic() - started
    said = server.said()
    if any(word in said for word in BAD_WORDS):
        found.append(re.sub(r"\s+", " ", said)[-900:])
    print(f"{what}: status {status}, clean after {waited:.1f} s{f', LEFT {found}' if found else ''}", flush=True)
    server.kill()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=0)
    parser.add_argument("--signals", action="store_true")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--phase", action="append", choices=list(PHASES))
    parser.add_argument("--patience", type=float, default=5)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    wrong: list[str] = []
    ends, started = 0, time.monotonic()
    for i in range(options.times):
        server, status = serve_once(options.flags)
        wrong += check(f"start {i + 1}", server, status, options.patience) or ([f"status {status}"] if status else [])
        ends += 1
    for phase in (options.phase or PHASES) if options.signals else []:
        for number in (signal.SIGINT, signal.SIGTERM):
            server, status = cut_short(options.flags, phase, number, options.twice)
            wrong += check(f"{signal.Signals(number).name} when {phase}", server, status, options.patience)
            ends += 1
    print(json.dumps({"ends": ends, "seconds": round(time.monotonic() - started, 1), "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
