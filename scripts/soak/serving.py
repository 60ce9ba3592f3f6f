"""`lockstep serve` for the scripts that try to break it: started, watched, ended, searched for remains.

What belongs to a server is known by a mark in its environment, which Ray's processes inherit however they are detached.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

MARK = "LOCKSTEP_SCRIPT_MARK"
MAIN = ["-c", "from lockstep.launch.cli.main import main; main()"]
TICKS = os.sysconf("SC_CLK_TCK")
START_S, END_S = 120.0, 60.0


class Serving:
    """A server on a free port, in a session of its own as from a terminal; `program` runs in place of the command."""

    def __init__(self, *flags: str, program: Sequence[str] = MAIN, **environment: str) -> None:
        self.mark = os.urandom(16).hex()
        self.log: IO[str] = tempfile.NamedTemporaryFile("w+", prefix="serve-", suffix=".log")  # noqa: SIM115 - of ours
        self.folder = Path(tempfile.mkdtemp(prefix="s-"))  # for all its temporary files; short, for sockets in it
        self.before = shared_memory()
        self.process = subprocess.Popen(
            [sys.executable, "-u", *program, "serve", "--port=0", *flags],
            env=os.environ | {MARK: self.mark, "TMPDIR": str(self.folder)} | environment,
            stdin=subprocess.DEVNULL, stderr=self.log, stdout=self.log, start_new_session=True,
        )  # fmt: skip

    def said(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def url(self) -> str:
        """Where it listens, once it serves."""
        wait(lambda: re.search(r"on http://\S+", self.said()) or self.process.poll() is not None, START_S)
        found = re.search(r"on (http://\S+)", self.said())
        if found is None:
            raise SystemExit(f"the server ended before it served:\n{self.said()}")
        return found[1]

    def processes(self) -> dict[int, str]:
        """Its live processes, by pid: the command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended meanwhile
                continue
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the status, as a shell has it."""
        self.process.send_signal(number)
        return self.process.wait(END_S)

    def left(self, patience_s: float) -> list[str]:
        """What is still there after its end, after at most so many seconds."""

        def found() -> list[str]:
            files = [*self.folder.glob("*"), *(shared_memory() - self.before)]
            return [f"process {pid}: {title}" for pid, title in self.processes().items()] + [str(f) for f in files]

        wait(lambda: not found(), patience_s)
        return found()

    def kill(self) -> None:
        """For the end of a run that failed: nothing of it may stay."""
        self.process.kill()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


def wait(holds: Callable[[], object], seconds: float) -> None:
    """Until it holds, or so many seconds have passed."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)


def shared_memory() -> set[Path]:
    """Of Ray, torch and NCCL; other people's servers on this machine may have some, too."""
    return {path for path in Path("/dev/shm").glob("*") if re.search(r"ray|plasma|torch|nccl", path.name)}


def cpu_seconds(pid: int) -> float:
    """Time that a process has computed, its ended threads included; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def title(command: str) -> str:
    """The short name of a process."""
    words = command.split()
    return next((word for word in words if word.startswith("ray::")), "") or " ".join(
        os.path.basename(word) for word in words[:1] + [w for w in words[1:] if w.endswith(".py") or w == "serve"]
    )
