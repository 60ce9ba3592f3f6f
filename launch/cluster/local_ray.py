"""A Ray cluster on this machine for this process alone: on loopback addresses, with a token, in a private folder.

Ray runs below a helper process. A start of Ray cannot be interrupted, but the helper can be killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import ray

import psutil  # type: ignore[import-untyped]  # isort: skip - Ray brings it, importable after `import ray`

from ...comm.message_sockets import WakeupEvent
from ...comm.message_text import first_line
from ..child_process import ChildFailed, ChildProcess, calling
from ..errors import PlacementError, RayLost
from ..signals import Undo
from .rank_resources import LOCAL_OBJECT_STORE_BYTES
from .ray_client import IsolatedJob, join_on_loopback, ray_prints_nothing, token_of, while_connected, with_token
from .ray_processes import RayProcesses
from .session_folder import SessionFolder, remove_folder, sweep

log = logging.getLogger(__name__)
START_S = 120.0  # Ray takes 4 s on two idle cores
POLL_S, WATCH_S = 0.2, 0.5
LOOPBACK = "127.0.0.1"
# Settings of the cluster. Nothing reads its metrics, and telemetry leaves a thread behind at each shutdown. Ray checks
# for a lack of memory once a second instead of four times. Ray ends a process whose call waits for a GCS that has
# ended, after a minute by default: nothing else interrupts such a call. It waits as long for a worker that was killed
# before it had registered, which takes a second on an idle machine: none is started in advance, one for each CPU.
SYSTEM_CONFIG = {
    "enable_open_telemetry": False,
    "enable_metrics_collection": False,
    "gcs_rpc_server_reconnect_timeout_s": 20,
    "prestart_worker_first_driver": False,
    "worker_register_timeout_seconds": 30,
}
DEFAULTS = {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_memory_monitor_refresh_ms": "1000"}
# With this Ray takes 127.0.0.1 for the node's address, as it does on Windows and macOS: other hosts cannot reach it.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
ATTACHED = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS")  # these would attach the cluster to another one


class LocalRay:
    """A local Ray cluster with `num_cpus` CPUs, to which this process is connected; always call `close`.

    Only processes with its token are let in, whatever RAY_AUTH_MODE says. Raises PlacementError if Ray does not start,
    or when `shutting_down` is set meanwhile.

    When a process that the ranks need has ended, a thread kills the rest of the cluster, sets `failure` and `wakeup`.
    """

    def __init__(self, num_cpus: int, shutting_down: threading.Event, wakeup: WakeupEvent) -> None:
        _check_loopback()
        self.failure: RayLost | None = None
        self._wakeup, self._closing, self._lock = wakeup, threading.Event(), threading.Lock()
        sweep()
        log.info("starting Ray on this machine, which takes a few seconds")
        started = time.perf_counter()
        with Undo() as stack:
            self.folder = SessionFolder()
            stack.callback(self.folder.close)
            self._process = ChildProcess(
                [*calling(serve_cluster), str(num_cpus), str(self.folder.path)],
                environment=_environment(self.folder),
                inherited=[self.folder.lock],
            )
            stack.callback(self._process.close)
            self._processes = RayProcesses(self._process.pid)
            stack.callback(self._processes.kill)  # stopped ranks too, which would outlive their raylet
            try:
                self.address = self._wait(shutting_down)
            except KeyboardInterrupt:
                log.warning("interrupted while Ray was starting")
                raise
            stack.enter_context(token_of(self.folder.token_path))
            stack.enter_context(ray_prints_nothing())
            stack.callback(while_connected, ray.shutdown)
            join_on_loopback(self.address)
            self._watcher = threading.Thread(target=self._watch, name="lockstep-ray-watch", daemon=True)
            stack.callback(self._end_watch)
            self._watcher.start()
            self._open = stack.pop_all()
        log.info("Ray is ready in %.1f s, at %s", time.perf_counter() - started, self.address)

    def check(self) -> RayLost | None:
        """Look at the processes now, in less than a millisecond; return `failure`."""
        with self._lock:
            problem = None if self.failure else self._processes.problem()
            if problem is not None:
                log.warning("%s: the local Ray cluster ends", problem)
                self.failure = RayLost(f"the local Ray cluster is lost: {problem}")
                self._processes.kill(spare="gcs_server")  # ray.shutdown is faster with it
                self._wakeup.set()
        return self.failure

    def close(self) -> None:
        """Disconnect this process and kill the cluster; safe to call twice."""
        self._open.close()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_S) and self.check() is None:
            pass

    def _end_watch(self) -> None:
        self._closing.set()
        self._watcher.join()

    def _wait(self, shutting_down: threading.Event) -> str:
        """Return the address of the started cluster."""
        deadline = time.monotonic() + START_S
        while not self._process.has_answer(POLL_S):
            if shutting_down.is_set():
                raise PlacementError("the start of Ray was aborted: the server is shutting down")
            self._processes.update()
            problem = self._processes.problem()
            if problem is not None:  # Ray would wait for it for half a minute
                raise PlacementError(f"Ray does not start on this machine: {problem}")
            if time.monotonic() > deadline:
                raise PlacementError(f"Ray has not started on this machine within {START_S:.0f} s; see its load")
        try:
            answer = self._process.answer(POLL_S)
        except ChildFailed as error:
            answer = {"error": f"{self._processes.problem() or 'its starter gives up'}: {error}"}
        if "error" in answer:
            raise PlacementError(f"Ray does not start on this machine: {answer['error']}")
        self._processes.update()
        return str(answer["address"])


def _check_loopback() -> None:
    """Raise PlacementError if this machine cannot reach itself: Ray would wait for minutes."""
    try:
        with socket.create_server((LOOPBACK, 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        raise PlacementError(f"{LOOPBACK} cannot be reached: {error}; ip link set lo up") from error


def _environment(folder: SessionFolder) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ATTACHED}
    return with_token(DEFAULTS | inherited | LOOPBACK_ONLY, folder.token_path)


def serve_cluster() -> None:
    """Run in the helper process: start Ray and print its address as JSON; end Ray when the parent process has ended."""
    num_cpus, folder = int(sys.argv[1]), Path(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # a supervisor may send it to all: the parent decides
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints
    # In the main thread Ray would replace the handler. Its servers end when the thread that has started them ends.
    threading.Thread(target=_start, args=(num_cpus, folder, answers), daemon=True).start()
    sys.stdin.read()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    remove_folder(folder)
    os._exit(0)


def _start(num_cpus: int, folder: Path, answers: TextIO) -> None:
    try:
        ray.init(
            address="local",
            job_config=IsolatedJob(),
            num_cpus=num_cpus,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(folder / "r"),  # not the folder itself, which Ray would open to everybody
            _system_config=SYSTEM_CONFIG,
        )
        answer = {"address": ray.get_runtime_context().gcs_address}
    except Exception as error:  # noqa: BLE001 - Ray raises plain Exception
        answer = {"error": first_line(error)}
    print(json.dumps(answer), file=answers, flush=True)
    threading.Event().wait()
