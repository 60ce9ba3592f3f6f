"""A `lockstep serve` process for the soak scripts: start it, watch it, end it, and find what it leaves behind.

The processes of a server are found by a mark in their environment. Ray's processes inherit it even when they detach.
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
LOCKSTEP = ["-c", "from lockstep.launch.cli.main import main; main()"]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_S, END_S = 120.0, 60.0  # longest waits for a start and for an end


class ServerProcess:
    """A server on a free port, in its own session like a command in a terminal.

    program      what Python runs in place of the `lockstep` command
    environment  variables to add
    """

    def __init__(self, *flags: str, program: Sequence[str] = LOCKSTEP, **environment: str) -> None:
        self._mark = os.urandom(16).hex()
        self._log: IO[str] = tempfile.NamedTemporaryFile("w+", prefix="serve-", suffix=".log")  # noqa: SIM115 - kept
        self._folder = Path(tempfile.mkdtemp(prefix="s-"))  # TMPDIR of the server; short, because it holds sockets
        self._dev_shm = dev_shm_files()
        self.process = subprocess.Popen(
            [sys.executable, "-u", *program, "serve", "--port=0", *flags],
            env=os.environ | {MARK: self._mark, "TMPDIR": str(self._folder)} | environment,
            stdin=subprocess.DEVNULL, stderr=self._log, stdout=self._log, start_new_session=True,
        )  # fmt: skip

    def log(self) -> str:
        """Return everything that the server has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def url(self) -> str:
        """Wait until the server listens and return its URL."""
        wait(lambda: re.search(r"on http://\S+", self.log()) or self.process.poll() is not None, START_S)
        address = re.search(r"on (http://\S+)", self.log())
        if address is None:
            raise SystemExit(f"the server ended before it served:\n{self.log()}")
        return address[1]

    def processes(self) -> dict[int, str]:
        """Return the command lines of its live processes by pid."""
        commands = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # the process has ended
                continue
        return commands

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit status; negative for a death by signal."""
        self.process.send_signal(number)
        return self.process.wait(END_S)

    def remains(self, timeout_s: float) -> list[str]:
        """Return the processes and files that are left `timeout_s` seconds after the end."""

        def find() -> list[str]:
            files = [*self._folder.glob("*"), *(dev_shm_files() - self._dev_shm)]
            return [f"process {pid}: {command}" for pid, command in self.processes().items()] + [str(f) for f in files]

        wait(lambda: not find(), timeout_s)
        return find()

    def kill(self) -> None:
        """Kill all its processes and remove its files."""
        self.process.kill()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)


def wait(condition: Callable[[], object], timeout_s: float) -> bool:
    """Return True when the condition holds, False when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def dev_shm_files() -> set[Path]:
    """Return the files in /dev/shm of Ray, torch and NCCL on this machine."""
    return {path for path in Path("/dev/shm").glob("*") if re.search(r"ray|plasma|torch|nccl", path.name)}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, ended threads included; 0 if it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def short_name(command: str) -> str:
    """Return a short name for a process: Ray's title, or the program with its scripts."""
    words = command.split()
    return next((word for word in words if word.startswith("ray::")), "") or " ".join(
        os.path.basename(word) for word in words[:1] + [w for w in words[1:] if w.endswith(".py") or w == "serve"]
    )
