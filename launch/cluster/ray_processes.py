"""The processes of a local Ray cluster: which ones its ranks need, and which of these has ended or is stopped.

Ray itself reports a lost server after a minute, or not at all. The kernel knows it at once.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..child_process import session_processes

STOPPED_S = 3.0  # a debugger may stop a process for a moment
SERVERS = ("gcs_server", "raylet")  # names of their programs
# Scripts and later titles of the processes without which the raylet ends. Ray's other helpers (its monitor, dashboard
# and log monitor) serve its own tools only.
AGENTS = {
    "dashboard agent": ("dashboard/agent.py", "ray::DashboardAgent"),
    "runtime env agent": ("runtime_env/agent/main.py", "ray::RuntimeEnvAgent"),
}
# The start of Ray waits for the workers that start with it, and has no deadline. Later they have another title.
WORKER, WORKER_SCRIPT = "worker", "workers/default_worker.py"
DRIVER = "driver"  # the starter's child, of which all others are children
ENDED, STOPPED = "XxZ", "T"  # states in proc(5)


@dataclass(frozen=True)
class ProcessState:
    """The kernel's record of a process, from /proc/PID/stat."""

    state: str  # one letter
    parent: int
    started: str  # together with the pid it identifies the process
    exit_code: int  # as waitpid returns it; readable until the parent has waited for the process

    @classmethod
    def read(cls, pid: int) -> ProcessState | None:
        """Return the state of this process; None if it does not exist."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(fields[0], int(fields[1]), fields[19], int(fields[49]))


class NeededProcess:
    """A process without which a local cluster cannot go on."""

    def __init__(self, role: str, pid: int) -> None:
        self.role, self.pid = role, pid
        self._first = ProcessState.read(pid)
        self._runs_at = time.monotonic()  # time of the last check at which it was not stopped

    def problem(self) -> str:
        """Return how it has ended, or that it is stopped; empty if neither."""
        now = ProcessState.read(self.pid)
        if now is None or self._first is None or now.started != self._first.started:
            return "has ended"
        if now.state in ENDED:
            return _end(now.exit_code)
        if now.state != STOPPED:
            self._runs_at = time.monotonic()
        stopped_s = time.monotonic() - self._runs_at
        return f"is stopped, for {stopped_s:.0f} s now" if stopped_s > STOPPED_S else ""

    def __str__(self) -> str:
        return f"Ray's {self.role} (pid {self.pid})"


class RayProcesses:
    """The processes of a cluster in the session that `root_pid` leads."""

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self._needed = {"starter": NeededProcess("starter", root_pid)}
        self._workers: dict[int, NeededProcess] = {}

    def update(self) -> None:
        """Add the needed processes that have started since the last call.

        Workers that have yet to register are among them, until `forget_workers`.
        """
        for pid in session_processes(self._root_pid):
            with suppress(OSError):  # it has ended meanwhile
                role = _role(pid)
                if role == WORKER:
                    self._add_worker(pid)
                elif role and role not in self._needed:
                    self._needed[role] = NeededProcess(role, pid)

    def forget_workers(self) -> None:
        """Leave the workers to the raylet, which knows all of them once Ray has started."""
        self._workers = {}

    def problem(self) -> str | None:
        """Return which needed process has ended or is stopped, and how; None if none. Takes less than a millisecond."""
        problems = [(process, text) for process in self._needed.values() if (text := process.problem())]
        if not problems:
            return None
        process, text = min(problems, key=_distance_from_cause)
        return f"{process} {text}"

    def worker_problem(self) -> str | None:
        """Return the same of a worker that is not forgotten; ask `problem` first, for a cause of its end."""
        workers = list(self._workers.values())  # another thread may update
        return next((f"{worker} {text}" for worker in workers if (text := worker.problem())), None)

    def _add_worker(self, pid: int) -> None:
        state = ProcessState.read(pid)
        if state and not {pid, state.parent} & self._workers.keys():  # a child has its parent's command at first
            self._workers[pid] = NeededProcess(WORKER, pid)

    def kill(self, spare: str = "") -> None:
        """Kill the session's processes, except the starter and, unless it is stopped, the one with role `spare`."""
        spared = self._needed.get(spare)
        kept = {spared.pid} if spared and not _is_stopped(spared.pid) else set()
        for pid in set(session_processes(self._root_pid)) - kept:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    state = ProcessState.read(pid)
    return state is not None and state.state == STOPPED


def _distance_from_cause(problem: tuple[NeededProcess, str]) -> int:
    """Return a number that is lowest for the process whose end has caused the others'.

    All end with the starter or the driver. A raylet that is not killed ends by itself when it has lost an agent, which
    it has waited for, and kills the other agent.
    """
    process, text = problem
    was_killed = "killed" in text
    if process.role in AGENTS:
        return 2 if was_killed else 1
    return 0 if was_killed or process.role in ("starter", DRIVER) else 3


def _role(pid: int) -> str:
    """Return the role of a process that is needed; empty for other processes. One that has ended has only its name."""
    folder = Path(f"/proc/{pid}")
    command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    for program in ((folder / "comm").read_text().strip(), os.path.basename(command[0])):
        if program in SERVERS:
            return program
    start = " ".join(command[:4])  # the raylet has the agents' commands among its arguments
    scripts = {**AGENTS, WORKER: (WORKER_SCRIPT,), DRIVER: ("import serve_cluster",)}
    return next((role for role, names in scripts.items() if any(name in start for name in names)), "")


def _end(exit_code: int) -> str:
    number = os.WTERMSIG(exit_code)
    if number == 0:
        return f"has ended with status {os.WEXITSTATUS(exit_code)}"
    return f"was killed by {signal.Signals(number).name}"
