"""Processes that a test has started, however they were detached: they carry a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from pathlib import Path

MARK = "LOCKSTEP_TEST_MARK"
# The threads of gRPC's pools, which Ray brings: they grow and shrink with load.
GRPC = ("event_engine", "grpc_", "default-executo", "resolver-execut", "timer_manager")


def new_mark() -> dict[str, str]:
    """Return an environment variable by which processes are found that were started with it."""
    return {MARK: uuid.uuid4().hex}


def marked(mark: dict[str, str], title: str = "") -> dict[int, str]:
    """Return the live processes with this mark whose command line contains `title`: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            has_mark = f"{MARK}={mark[MARK]}".encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if has_mark and title in command:
            found[int(folder.name)] = command
    return found


def kill_marked(mark: dict[str, str]) -> None:
    """Kill the processes with this mark, for the end of a test that failed."""
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def threads() -> list[str]:
    """Return the names of this process's threads, without those of gRPC's pools."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return sorted(name for name in names if not name.startswith(GRPC))
