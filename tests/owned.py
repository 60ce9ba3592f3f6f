"""Which processes belong to whom: by a mark in their environment, because other people's Ray runs on the same machine.

What a marked process starts inherits the mark: Ray's servers and workers too, however they were detached from it.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

NAME = "LOCKSTEP_TEST_MARK"


def new_mark() -> dict[str, str]:
    """An environment variable to start something with."""
    return {NAME: uuid.uuid4().hex}


def marked(mark: dict[str, str], title: str = "") -> dict[int, str]:
    """The live processes with this mark whose command line contains `title`: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            owned = f"{NAME}={mark[NAME]}".encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if owned and title in command:
            found[int(folder.name)] = command
    return found


def wait_until_gone(mark: dict[str, str], timeout_s: float) -> dict[int, str]:
    """What is left of the marked processes after at most timeout_s."""
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill_marked(mark: dict[str, str]) -> None:
    """For the end of a test that failed: nothing of it may stay behind."""
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
