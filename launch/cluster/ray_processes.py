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

import ray  # noqa: F401 - brings psutil

import psutil  # type: ignore[import-untyped]  # isort: skip

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
ENDED, STOPPED = "XxZ", "T"  # states in proc(5)


@dataclass(frozen=True)
class ProcessState:
    """The kernel's record of a process, from /proc/PID/stat."""

    state: str  # one letter
    started: str  # together with the pid it identifies the process
    exit_code: int  # as waitpid returns it; readable until the parent has waited for the process

    @classmethod
    def read(cls, pid: int) -> ProcessState | None:
        """Return the state of this process; None if it does not exist."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(fields[0], fields[19], int(fields[49]))


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
    """The processes of a cluster below `root_pid`, which is the leader of their session."""

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self._needed = {"starter": NeededProcess("starter", root_pid)}
        self._workers: dict[int, NeededProcess] = {}

    def update(self) -> None:
        """Add the needed processes that have started since the last call, from all below the root.

        Workers that have yet to register are among them, until `forget_workers`.
        """
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._root_pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    role = _role(process)
                    if role == WORKER:
                        self._add_worker(process)
                    elif role and role not in self._needed:
                        self._needed[role] = NeededProcess(role, process.pid)

    def forget_workers(self) -> None:
        """Leave the workers to the raylet, which knows all of them once Ray has started."""
        self._workers = {}

    def problem(self) -> str | None:
        """Return which needed process has ended or is stopped, and how; None if none. Takes less than a millisecond."""
        processes = [*self._needed.values(), *self._workers.values()]
        problems = [(process, text) for process in processes if (text := process.problem())]
        if not problems:
            return None
        process, text = min(problems, key=_distance_from_cause)
        return f"{process} {text}"

    def _add_worker(self, process: psutil.Process) -> None:
        if process.pid not in self._workers and process.ppid() not in self._workers:  # a child has its command at first
            self._workers[process.pid] = NeededProcess(WORKER, process.pid)

    def kill(self, spare: str = "") -> None:
        """Kill the session's processes, except the starter and, unless it is stopped, the one with role `spare`."""
        spared = self._needed.get(spare)
        kept = {self._root_pid} | ({spared.pid} if spared and not _is_stopped(spared.pid) else set())
        for pid in set(psutil.pids()) - kept:
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == self._root_pid:
                    os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    state = ProcessState.read(pid)
    return state is not None and state.state == STOPPED


def _distance_from_cause(problem: tuple[NeededProcess, str]) -> int:
    """Return a number that is lowest for the process whose end has caused the others'.

    All end with the starter, and workers with the raylet. A raylet that is not killed ends by itself when it has lost
    an agent, which it has waited for, and kills the other agent.
    """
    process, text = problem
    was_killed = "killed" in text
    if process.role == WORKER:
        return 4
    if process.role in AGENTS:
        return 2 if was_killed else 1
    return 0 if was_killed or process.role == "starter" else 3


def _role(process: psutil.Process) -> str:
    """Return the role of a process that is needed; empty for other processes."""
    command = []
    with suppress(psutil.ZombieProcess, psutil.AccessDenied):  # one that has ended has only its name
        command = process.cmdline()
    for program in (process.name(), os.path.basename(command[0]) if command else ""):
        if program in SERVERS:
            return program
    start = " ".join(command[:4])  # the raylet has the agents' commands among its arguments
    scripts = {**AGENTS, WORKER: (WORKER_SCRIPT,)}
    return next((role for role, names in scripts.items() if any(name in start for name in names)), "")


def _end(exit_code: int) -> str:
    number = os.WTERMSIG(exit_code)
    if number == 0:
        return f"has ended with status {os.WEXITSTATUS(exit_code)}"
    return f"was killed by {signal.Signals(number).name}"
