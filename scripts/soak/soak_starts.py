"""Start and end `lockstep serve` many times, or interrupt it in every phase, and check that nothing is left.

    python scripts/soak/soak_starts.py --times 50 -- --tp 2 --device cpu
    python scripts/soak/soak_starts.py --signals -- --tp 2 --device cpu

With --times, each server answers one request and ends. With --signals, SIGINT (to the whole session, as a terminal
sends Ctrl-C) and SIGTERM arrive in each phase; --twice sends each signal twice. Flags after `--` go to the server.
After each end, the script looks for processes of the server, and for new files in /dev/shm and its temporary folder.
They must be gone within --patience seconds, and the log must hold no traceback.

Prints one line for each end. The last line is JSON: the number of ends, the seconds, and the number of faults. The
exit status is 1 if there were faults.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from server_process import END_S, ServerProcess, wait

REQUEST = {"prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
LONG_REQUEST = {"prompt": "In the beginning", "max_tokens": 1900, "ignore_eos": True, "stream": True}
CRASH_WORDS = ("Traceback", "Fatal Python error", "terminate called", "core dumped")
SIGNALS = ("SIGINT", "SIGTERM")
Phase = Callable[[ServerProcess], bool]


def log_contains(text: str) -> Phase:
    """Return the phase after a line of the log."""
    return lambda server: text in server.log()


def has_process(*names: str) -> Phase:
    """Return the phase in which a process of one of these names is live."""
    return lambda server: any(name in command for command in server.processes().values() for name in names)


def has_loaded(library: str) -> Phase:
    """Return the phase in which the process imports the library: its code has just been mapped."""

    def holds(server: ServerProcess) -> bool:
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
    "Ray's agents are there": has_process("dashboard/agent.py", "ray::DashboardAgent"),
    "Ray has started": log_contains("Ray is ready"),
    "ranks are there": has_process("ray::Worker"),  # they load the model within milliseconds
    "ranks size their cache": log_contains("communication:"),
    "serving": log_contains("on http://"),
    "streaming": log_contains("on http://"),
    "draining": log_contains("on http://"),
}


def serve_once(flags: list[str]) -> tuple[ServerProcess, int]:
    """Start a server, send a request and end it; returns the server and its exit status."""
    server = ServerProcess(*flags)
    try:
        httpx.post(server.url() + "/v1/completions", json=REQUEST, timeout=60).raise_for_status()
        return server, server.end()
    except BaseException:
        server.kill()
        raise


def interrupt(flags: list[str], phase: str, number: int, twice: bool) -> tuple[ServerProcess, int]:
    """Start a server and send the signal in the phase; returns the server and its exit status."""
    server = ServerProcess(*flags, "--drain-timeout=1")
    try:
        if not wait(lambda: PHASES[phase](server), END_S):
            raise SystemExit(f"within {END_S:.0f} s it was never true that {phase}:\n{server.log()}")
        stream = _stream(server) if phase in ("streaming", "draining") else None
        if phase == "draining":
            _send(server, number)
            wait(lambda: "draining" in server.log(), 5)
        _send(server, number)
        if twice:
            time.sleep(0.2)
            _send(server, number)
        if not wait(lambda: server.process.poll() is not None, END_S):
            raise SystemExit(f"it has not ended {END_S:.0f} s after signal {number}:\n{server.log()}")
        status = server.process.wait()
        if stream is not None:
            stream[0].close()
        return server, status
    except BaseException:
        server.kill()
        raise


def _send(server: ServerProcess, number: int) -> None:
    if server.process.poll() is None:
        (os.killpg if number == signal.SIGINT else os.kill)(server.process.pid, number)


def _stream(server: ServerProcess) -> tuple[httpx.Client, Iterator[str]]:
    """Return a client in the middle of a stream, and its lines; the stream ends when they are collected."""
    client = httpx.Client(base_url=server.url(), timeout=60)
    response = client.send(client.build_request("POST", "/v1/completions", json=LONG_REQUEST), stream=True)
    lines = response.iter_lines()
    next(lines)
    return client, lines


def check(end: str, server: ServerProcess, status: int, patience_s: float) -> list[str]:
    """Print a line about this end and return its faults."""
    started = time.monotonic()
    faults = server.remains(patience_s)
    seconds = time.monotonic() - started
    log = server.log()
    if any(word in log for word in CRASH_WORDS):
        faults.append(re.sub(r"\s+", " ", log)[-900:])
    print(f"{end}: status {status}, clean after {seconds:.1f} s{f', LEFT {faults}' if faults else ''}", flush=True)
    server.kill()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=0, help="starts and ends")
    parser.add_argument("--signals", action="store_true", help="interrupt each phase")
    parser.add_argument("--signal", action="append", choices=SIGNALS, help="only this signal; repeat for both")
    parser.add_argument("--twice", action="store_true", help="send each signal twice")
    parser.add_argument("--phase", action="append", choices=list(PHASES), help="only this phase; repeat for several")
    parser.add_argument("--patience", type=float, default=5, help="seconds until everything must be gone")
    parser.add_argument("flags", nargs="*", help="flags of the server")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and their children ignore it
    faults: list[str] = []
    num_ends, started = 0, time.monotonic()
    for i in range(options.times):
        server, status = serve_once(options.flags)
        faults += check(f"start {i + 1}", server, status, options.patience) or ([f"status {status}"] if status else [])
        num_ends += 1
    for phase in (options.phase or PHASES) if options.signals else []:
        for name in options.signal or SIGNALS:
            number = signal.Signals[name]
            server, status = interrupt(options.flags, phase, number, options.twice)
            faults += check(f"{name} when {phase}", server, status, options.patience)
            num_ends += 1
    print(json.dumps({"ends": num_ends, "seconds": round(time.monotonic() - started, 1), "wrong": len(faults)}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
