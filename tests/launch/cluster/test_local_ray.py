"""A local Ray of our own: closed to others whatever the environment says, interruptible, and gone with its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.launch.cluster.session_folder import sweep

from processes import kill_marked, marked, new_mark
from small import COMMAND, SMALL_FLAGS
from waiting import left_after, wait_until

pytestmark = pytest.mark.process
NIGHTLY = pytest.mark.nightly

# Start, use, restart and end a cluster, as an owner with settings of its own that must come back.
OWNER = """
import json, os, sys, threading
import ray
from lockstep.comm.message_sockets import WakeupEvent
from lockstep.launch.cluster.local_ray import LocalRay
from lockstep.launch.cluster.rank_resources import LocalCluster

@ray.remote
def environment():
    return dict(os.environ), sys.path, os.nice(0)

def auth():
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}

before = auth()
for turn in range(int(sys.argv[1])):
    cluster = LocalRay(LocalCluster(1, starts_workers=True), threading.Event(), WakeupEvent())
    inside, path, niceness = ray.get(environment.remote())
    report = {"address": cluster.address, "node": ray.nodes()[0]["NodeManagerAddress"], "path": path,
              "folder": str(cluster.folder.path), "mode": inside["RAY_AUTH_MODE"],
              "niceness": niceness}
    print(json.dumps(report), flush=True)
    if sys.argv[2:] == ["wait"]:
        sys.stdin.read()
    cluster.close()
    cluster.close()
    assert auth() == before, auth()
    assert not os.path.exists(report["folder"])
    assert not ray.is_initialized()
"""
# A command whose first worker ends before Ray knows it, and before the command waits for Ray.
LOST_WORKER = """
import logging, os, signal, sys, threading, time
import ray
from lockstep.comm.message_sockets import WakeupEvent
from lockstep.launch.cluster.connection import start_ray
from lockstep.launch.cluster.ray_starter import _ahead, start_ray_ahead
from lockstep.runtime.config import Config

logging.basicConfig(level=logging.WARNING)
config = Config(tensor_parallel_size=2, device="cpu")
with start_ray_ahead(config):
    processes = _ahead[-1].processes
    while not processes._workers:
        time.sleep(0.01)
    worker = min(processes._workers)
    os.kill(worker, signal.SIGKILL)
    while processes.worker_problem() is None:
        time.sleep(0.01)
    print(worker, flush=True)
    sys.stdin.readline()
    cluster = start_ray(config, threading.Event(), WakeupEvent())
    print(ray.get(ray.remote(lambda: "it works").remote()), flush=True)
    cluster.close()
"""
# What another user of this machine can try: connect without a token.
STRANGER = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
print("let in")
"""


@pytest.fixture
def mark() -> Iterator[dict[str, str]]:
    """The mark of one test's processes, of which none may be left."""
    mark = new_mark()
    yield mark
    left = left_after(lambda: marked(mark))
    kill_marked(mark)
    assert not left


def start_owner(
    mark: dict[str, str], turns: int, *arguments: str, program: str = OWNER, **environment: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(turns), *arguments]
    pipe, variables = subprocess.PIPE, {**os.environ, **mark, **environment}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=variables)


def test_cluster_of_a_user_without_home_lets_no_stranger_in(mark: dict[str, str]) -> None:
    """The mode is disabled, and HOME holds no token: the cluster has its own. It ends with an owner that is killed."""
    owner = start_owner(mark, 1, "wait", HOME="/nonexistent", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="secret")
    assert owner.stdout is not None
    report = json.loads(owner.stdout.readline())
    assert report["mode"] == "token"
    assert report["node"] == "127.0.0.1"
    assert report["niceness"] == os.nice(0), "other processes of the machine would leave ranks with less no core"
    assert report["address"].startswith("127.0.0.1:")
    folder = Path(report["folder"])
    assert [folder.stat().st_mode & 0o777, (folder / "token").stat().st_mode & 0o777] == [0o700, 0o600]
    tried = subprocess.Popen(
        [sys.executable, "-c", STRANGER, report["address"]], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, **mark, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert tried.stderr is not None
    said = tried.stderr.readline()
    tried.kill()
    out, rest = tried.communicate()
    assert "Unauthenticated" in said, said + rest
    assert out == ""
    assert_doctor_names_the_token(report["address"], mark)
    owner.kill()
    owner.communicate(timeout=60)
    assert not left_after(lambda: marked(mark))
    wait_until(lambda: not folder.exists())


def assert_doctor_names_the_token(address: str, mark: dict[str, str]) -> None:
    """The check of another token takes a second and prints one line: Ray itself tries for 20 s."""
    environment = {**os.environ, **mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    command = [*COMMAND, "doctor", f"--ray-address={address}"]
    doctor = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert doctor.returncode == 1
    lines = doctor.stdout.splitlines()
    assert len(lines) == 1, doctor.stdout
    assert lines[0].startswith(f"fail  Ray cluster: the Ray cluster at {address} refuses the token in RAY_AUTH_TOKEN, ")
    assert "; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the token of its nodes" in lines[0]
    assert doctor.stderr == ""


def test_start_without_a_worker_is_repeated(mark: dict[str, str]) -> None:
    owner = start_owner(mark, 0, program=LOST_WORKER)
    out, err = owner.communicate("\n", timeout=60)
    worker, result = out.splitlines()
    assert result == "it works", err
    assert f"Ray's worker (pid {worker}) " in err
    assert " while Ray was starting; starting it again, without workers" in err


def test_nothing_is_left_of_a_start_that_waits_for_ever(mark: dict[str, str]) -> None:
    """Its process that connects to Ray executes no more Python code."""
    owner = start_owner(mark, 0, program=LOST_WORKER)
    assert owner.stdout is not None
    assert owner.stdout.readline()
    wait_until(lambda: marked(mark, "ray::IDLE"))  # the other worker has registered
    owner.kill()
    owner.communicate()
    assert not left_after(lambda: marked(mark))


@NIGHTLY
def test_cluster_starts_again_in_the_same_process(mark: dict[str, str]) -> None:
    owner = start_owner(mark, 2)
    out, err = owner.communicate(timeout=180)
    assert owner.returncode == 0, err
    assert len(set(out.splitlines())) == 2


@NIGHTLY
def test_folder_of_a_killed_owner_and_helper_is_removed_by_the_next_start(mark: dict[str, str]) -> None:
    owner = start_owner(mark, 1, "wait")
    assert owner.stdout is not None
    folder = Path(json.loads(owner.stdout.readline())["folder"])
    for pid in [owner.pid, *marked(mark, "serve_cluster")]:
        os.kill(pid, signal.SIGKILL)
    owner.wait(60)
    assert not left_after(lambda: marked(mark), 65)
    assert folder.exists()
    sweep()
    assert not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=NIGHTLY)])
def test_signal_while_ray_starts_ends_the_command_in_seconds(mark: dict[str, str], number: signal.Signals) -> None:
    command = [*COMMAND, "generate", "--tp=2", "--prompt=In the", *SMALL_FLAGS]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **mark}, start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: marked(mark, "serve_cluster"))
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "starting Ray on this machine" in err
    assert "interrupted while Ray was starting" in err or "ending the start of Ray" in err
    assert "Traceback" not in err
    assert not left_after(lambda: marked(mark))


# fmt: off
SHADOWS = (
    "json", "numpy", "tokenize", "torch", "signal", "ray", "msgspec", "zmq", "transformers", "socket", "lockstep",
)
# fmt: on


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A folder with modules that have the names of real ones, and end a process that imports them."""
    for name in SHADOWS:
        path = tmp_path / name / "__init__.py" if name == "lockstep" else tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("import os; open(os.path.join(os.path.dirname(__file__), 'imported'), 'w'); os._exit(9)")
    return tmp_path


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=NIGHTLY)])
def test_files_in_the_current_folder_are_not_imported(mark: dict[str, str], shadowed: Path, ranks: int) -> None:
    """The command, its helpers and the ranks; the console script has its own folder on the path, not the current."""
    program = f"import sys; sys.path = [p for p in sys.path if p]; {COMMAND[-1]}"
    command = [*COMMAND[:-1], program, "generate", *SMALL_FLAGS, f"--tp={ranks}", "--prompt=In the", "--max-tokens=3"]
    done = subprocess.run(
        command, cwd=shadowed, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        env={**os.environ, **mark},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(shadowed.rglob("imported"))
