"""The start of Ray on this machine, in a helper process: it can be killed, which a call of ray.init cannot.

This module imports no Ray and no torch: a command starts Ray first, and imports both meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ...comm.message_text import first_line
from ...runtime.config import Config
from ..child_process import ChildProcess, calling, session_processes
from ..errors import PlacementError
from ..open_files import require_open_files
from ..signals import Undo
from .rank_resources import LOCAL_OBJECT_STORE_BYTES, LocalCluster, local_cluster
from .ray_address import needs_local_ray
from .ray_processes import RayProcesses
from .session_folder import SessionFolder, folder_sockets, remove_folder_of_argument, sweep, with_token

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
SYSTEM_CONFIG = {  # of the cluster
    "enable_open_telemetry": False,  # telemetry leaves a thread behind at each shutdown
    "enable_metrics_collection": False,  # nothing reads the metrics
    # Ray ends a process whose call waits for a GCS that is gone, by default after a minute. Nothing else ends the call.
    "gcs_rpc_server_reconnect_timeout_s": 20,
    "prestart_worker_first_driver": False,  # Ray would start a worker for each CPU, and let it import nothing
    "worker_niceness": 0,  # at Ray's 15, a busy process of the machine would leave a rank 1 % of a core
    # Longest wait for a worker to register, which takes a second on an idle machine. A worker may be killed before.
    "worker_register_timeout_seconds": 30,
}
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_memory_monitor_refresh_ms": "1000",  # Ray looks for a lack of memory every 250 ms otherwise
    # The raylet connects to its own object store, whose thread may start later. It tries again after 50 ms, not 1 s.
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
}
# Each CPU's worker starts with the raylet, and imports what a rank needs. A Ray that does not know these variables
# starts a worker for each actor.
WORKERS_AHEAD = {
    "RAY_enable_worker_prestart": "true",
    "RAY_preload_python_modules": f"{__package__}.rank_imports",
    # Ray would end them 1 s later, when the placement group has reserved their CPUs.
    "RAY_idle_worker_killing_time_threshold_ms": "3600000",
}
# With this Ray takes 127.0.0.1 for the node's address, as it does on Windows and macOS: other hosts cannot reach it.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
PR_SET_PDEATHSIG = 1  # of prctl(2)
WATCH_S = 0.1  # a worker registers after a second
ATTACHED = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS")  # these would attach the cluster to another one
_ahead: list[RayStarter] = []  # at most one, which `start_ray_ahead` has started and no LocalRay has taken


class RayStarter:
    """A helper process that starts a Ray cluster of this size, below which it runs; always call `close`.

    It ends the cluster when this process has ended. Its answer is {"address": ...} or {"error": ...}.
    Raises PlacementError if this machine cannot reach itself, or allows too few open files.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        require_open_files()
        _check_loopback()
        sweep()
        log.info("starting Ray on this machine, which takes a few seconds")
        self.started, self.cluster = time.perf_counter(), cluster
        with Undo() as stack:
            self.folder = SessionFolder()
            stack.callback(self.folder.close)
            self.process = ChildProcess(
                [*calling(serve_cluster), str(cluster.num_cpus), str(self.folder.path)],
                environment=_environment(self.folder, cluster),
                inherited=[self.folder.lock],
            )
            stack.callback(self.process.close)
            self.processes, self._watch_ends = RayProcesses(self.process.pid), threading.Event()
            self._watcher = threading.Thread(target=self._watch, name="lockstep-ray-start-watch", daemon=True)
            self._watcher.start()
            stack.callback(self.end_watch)
            self._open = stack.pop_all()

    def end_watch(self) -> None:
        """Let the caller alone update `processes` from now on; safe to call twice."""
        self._watch_ends.set()
        self._watcher.join()

    def _watch(self) -> None:
        """Get to know the workers from the first: nobody else would miss one that ends while this process imports."""
        while not self._watch_ends.wait(WATCH_S):
            self.processes.update()

    def close(self) -> None:
        """Kill the cluster and remove its folder; safe to call twice."""
        self._open.close()


@contextmanager
def start_ray_ahead(config: Config, replicas: int = 1) -> Iterator[None]:
    """Start the local Ray that the ranks need, if any, at the beginning of the block; a LocalRay takes it over.

    The block imports torch, which takes as long. A cluster that nobody has taken ends with the outermost block.
    """
    ray = sys.modules.get("ray")
    is_connected = ray is not None and ray.is_initialized()  # by the user of the offline API
    if _ahead or is_connected or not needs_local_ray(config, replicas):
        yield
        return
    _ahead.append(RayStarter(local_cluster(config, replicas)))
    try:
        yield
    finally:
        while _ahead:
            log.info("ending the start of Ray")
            _ahead.pop().close()


def ray_starter(cluster: LocalCluster) -> RayStarter:
    """Return the start in progress if it is that of such a cluster, else a new one."""
    if _ahead and _ahead[-1].cluster == cluster:
        return _ahead.pop()
    return RayStarter(cluster)


def _check_loopback() -> None:
    """Raise PlacementError if this machine cannot reach itself: Ray would wait for minutes."""
    try:
        with socket.create_server((LOOPBACK, 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        raise PlacementError(f"{LOOPBACK} cannot be reached: {error}; ip link set lo up") from error


def _environment(folder: SessionFolder, cluster: LocalCluster) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ATTACHED}
    defaults = DEFAULTS | (WORKERS_AHEAD if cluster.starts_workers else {})
    return with_token(defaults | inherited | LOOPBACK_ONLY, folder.token_path)


def serve_cluster() -> None:
    """Run in the helper process: start Ray and print its address as JSON; end Ray when the parent process has ended.

    A process of its own connects to Ray, because Ray may hold its interpreter for ever: it would see no end of stdin.
    """
    num_cpus, folder = int(sys.argv[1]), Path(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # a supervisor may send it to all: the parent decides
    starter, driver = os.getpid(), os.fork()
    if driver == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != starter:  # it ended before the call
            return
        answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints
        # In the main thread Ray would replace the handler. Its servers end with the thread that has started them.
        thread = threading.Thread(target=_start, args=(num_cpus, folder, answers))
        thread.start()
        thread.join()
    threading.Thread(target=_kill_at_end_of_input, args=(driver,), daemon=True).start()
    os.waitpid(driver, 0)
    for pid in session_processes(starter):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.execv(sys.executable, [sys.executable, *calling(remove_folder_of_argument), str(folder)])


def _kill_at_end_of_input(pid: int) -> None:
    sys.stdin.read()
    os.kill(pid, signal.SIGKILL)


def _start(num_cpus: int, folder: Path, answers: TextIO) -> None:
    try:
        import ray

        from .ray_client import IsolatedJob

        private = ray._private
        # Ray would start the server of its dashboard even without the dashboard, and wait 2 s for it.
        private.services.start_api_server = lambda *arguments, **options: ("", None)
        # The autoscaler has nothing to scale. The agent would try for 4 s to get port 52365 if another cluster has it.
        # Ray's own paths of sockets are 63 bytes longer than these: few folders would be short enough.
        options = {"no_monitor": True, "dashboard_agent_listen_port": 0, **folder_sockets(folder)}
        make_params = private.parameter.RayParams
        private.parameter.RayParams = lambda **arguments: make_params(**(arguments | options))
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
