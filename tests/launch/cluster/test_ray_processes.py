"""The watch of a local Ray cluster's processes, over processes that only have the names of Ray's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.launch.cluster import ray_processes
from lockstep.launch.cluster.ray_processes import NeededProcess, RayProcesses

from processes import is_running
from waiting import wait_until

# The raylet ends by itself with status 1 when it gets SIGTERM. Of the agents, one has set its title already.
STARTER = """
import subprocess, sys
def start(*command, program="/bin/sh"):
    print(subprocess.Popen(command, executable=program).pid, flush=True)
start("/a/gcs_server", "1000", program="/bin/sleep")
start("/a/raylet", "-c", "trap 'exit 1' TERM; while :; do sleep 0.02; done", "dashboard/agent.py")
start("ray::RuntimeEnvAgent", "1000", program="/bin/sleep")
start("python", "-c", "sleep 1000", "/ray/dashboard/agent.py")
start("python", "-c", "sleep 1000", "/ray/monitor.py")
start("ray::Worker", "1000", program="/bin/sleep")
start("python", "-c", "sleep 1000", "/ray/_private/workers/default_worker.py")
start("python", "-c", "sleep 1000", "/ray/_private/workers/default_worker.py")
sys.stdin.read()
"""
NAMES = (
    "gcs_server",
    "raylet",
    "runtime env agent",
    "dashboard agent",
    "monitor",
    "worker",
    "new worker",
    "other new worker",
)


class FakeRay:
    """A starter in its own session, with children; `pids` by role."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.starter = subprocess.Popen(
            [sys.executable, "-c", STARTER], stdin=pipe, stdout=pipe, start_new_session=True
        )
        assert self.starter.stdout is not None
        self.pids = {name: int(self.starter.stdout.readline()) for name in NAMES}
        self.watch = RayProcesses(self.starter.pid)

    def end(self) -> None:
        self.watch.kill()
        self.starter.kill()
        self.starter.communicate()


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has set a handler for a signal, which would otherwise end it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.fixture
def fake_ray() -> Iterator[FakeRay]:
    started = FakeRay()
    wait_until(lambda: started.watch.update() or (len(started.watch._needed) == 5 and len(started.watch._workers) == 2))
    assert started.watch.problem() is None
    wait_until(lambda: catches(started.pids["raylet"], signal.SIGTERM))
    yield started
    started.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("role", ["gcs_server", "raylet", "runtime env agent", "dashboard agent"])
def test_killed_process_is_named_with_its_signal(fake_ray: FakeRay, role: str, number: signal.Signals) -> None:
    os.kill(fake_ray.pids[role], number)
    wait_until(fake_ray.watch.problem)
    assert fake_ray.watch.problem() == f"Ray's {role} (pid {fake_ray.pids[role]}) was killed by {number.name}"


def test_worker_is_needed_until_it_is_forgotten(fake_ray: FakeRay) -> None:
    os.kill(fake_ray.pids["other new worker"], signal.SIGKILL)
    wait_until(fake_ray.watch.worker_problem)
    pid = fake_ray.pids["other new worker"]
    assert fake_ray.watch.worker_problem() == f"Ray's worker (pid {pid}) was killed by SIGKILL"
    assert fake_ray.watch.problem() is None
    fake_ray.watch.forget_workers()
    assert fake_ray.watch.worker_problem() is None
    assert len(fake_ray.watch._needed) == 5
    assert not fake_ray.watch._workers


def test_server_that_ended_before_the_first_update_is_found() -> None:
    """A process that has ended has no command line."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(shutil.copy("/bin/sleep", Path(folder) / "raylet"))
        # The variable keeps the ended process a zombie: Python waits for the processes of collected Popen objects.
        code = f"import subprocess, sys; ended = subprocess.Popen([{str(program)!r}, '0']); sys.stdin.read()"
        starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
        watch = RayProcesses(starter.pid)
        wait_until(lambda: watch.update() or "has ended with status 0" in str(watch.problem()))
        assert str(watch.problem()).startswith("Ray's raylet (pid ")
        starter.communicate()


def test_starter_killed_is_named_before_its_children(fake_ray: FakeRay) -> None:
    fake_ray.starter.kill()
    os.kill(fake_ray.pids["raylet"], signal.SIGTERM)
    wait_until(lambda: not is_running(fake_ray.pids["raylet"]))
    assert fake_ray.watch.problem() == f"Ray's starter (pid {fake_ray.starter.pid}) was killed by SIGKILL"


def test_agent_is_named_as_the_cause_of_the_raylets_end(fake_ray: FakeRay) -> None:
    os.kill(fake_ray.pids["raylet"], signal.SIGTERM)
    wait_until(fake_ray.watch.problem)
    assert fake_ray.watch.problem() == f"Ray's raylet (pid {fake_ray.pids['raylet']}) has ended with status 1"
    os.kill(fake_ray.pids["dashboard agent"], signal.SIGKILL)
    wait_until(lambda: "dashboard agent" in str(fake_ray.watch.problem()))


def test_agent_killed_by_the_raylet_is_not_the_cause() -> None:
    """The raylet has waited for the agent that has ended by itself, and its exit code is gone."""
    watch = RayProcesses(os.getpid())
    problems = {"dashboard agent": "was killed by SIGKILL", "runtime env agent": "has ended", "raylet": "has ended"}
    for role, text in problems.items():
        watch._needed[role] = NeededProcess(role, 7)
        watch._needed[role].problem = lambda text=text: text  # type: ignore[method-assign,misc]
    assert watch.problem() == "Ray's runtime env agent (pid 7) has ended"


def test_raylet_killed_is_the_cause_of_its_agents_end(fake_ray: FakeRay) -> None:
    for role in ("raylet", "dashboard agent"):
        os.kill(fake_ray.pids[role], signal.SIGKILL)
        wait_until(lambda pid=fake_ray.pids[role]: not is_running(pid))  # type: ignore[misc]
    assert str(fake_ray.watch.problem()).startswith("Ray's raylet ")


def test_stopped_process_is_a_problem_after_a_while(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    os.kill(fake_ray.pids["gcs_server"], signal.SIGSTOP)
    assert fake_ray.watch.problem() is None, "a debugger stops it for a moment"
    monkeypatch.setattr(ray_processes, "STOPPED_S", 0.1)
    wait_until(fake_ray.watch.problem)
    assert "gcs_server" in str(fake_ray.watch.problem())
    assert " is stopped, for " in str(fake_ray.watch.problem())
    os.kill(fake_ray.pids["gcs_server"], signal.SIGCONT)
    wait_until(lambda: fake_ray.watch.problem() is None)


def test_ends_of_processes_that_no_rank_needs_are_no_problem(fake_ray: FakeRay) -> None:
    for role in ("monitor", "worker"):
        os.kill(fake_ray.pids[role], signal.SIGKILL)
        wait_until(lambda pid=fake_ray.pids[role]: not is_running(pid))  # type: ignore[misc]
    assert fake_ray.watch.problem() is None


@pytest.mark.parametrize("is_stopped", [False, True])
def test_kill_ends_stopped_processes_and_spares_one_that_runs(fake_ray: FakeRay, is_stopped: bool) -> None:
    os.kill(fake_ray.pids["worker"], signal.SIGSTOP)
    if is_stopped:
        os.kill(fake_ray.pids["gcs_server"], signal.SIGSTOP)
        wait_until(lambda: ray_processes._is_stopped(fake_ray.pids["gcs_server"]))
    fake_ray.watch.kill(spare="gcs_server")
    wait_until(lambda: not any(is_running(pid) for role, pid in fake_ray.pids.items() if role != "gcs_server"))
    assert is_running(fake_ray.pids["gcs_server"]) != is_stopped
    assert fake_ray.starter.poll() is None
    assert is_running(os.getpid())
