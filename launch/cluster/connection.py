"""The connection of this process to Ray, and the local Ray cluster that it may start."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from ...runtime.config import Config
from ..errors import PlacementError
from ..signals import Undo, signals_wait
from .resources import LOCAL_OBJECT_STORE_BYTES
from .sockets import WakeupEvent


class Connection:
    """This process's connection to Ray, for one executor after the other; `close` ends a cluster of our own.

    The thread that waits for an executor's output is woken by `bell`, which also rings when a rank fails. A start in
    progress is given up when `leaving` is set. Whether there are GPUs is found out once: ranks that are started again
    after a node was lost must not find themselves on a CPU.
    """

    def __init__(self, config: Config, replicas: int = 1) -> None:
        self.bell = WakeupEvent()
        self.leaving = threading.Event()
        with Undo() as stack:
            stack.callback(self.bell.close)
            ours = start_ray(config, stack, replicas)
            self.ip = "127.0.0.1" if ours else None  # one machine: keep off the network
            self.has_gpus = has_gpus()
            self.has_started = False  # ranks, at least once: from then on a node that is missing may come back
            self._open = stack.pop_all()

    def close(self) -> None:
        """Safe to call twice."""
        self._open.close()


log = logging.getLogger(__name__)

REMOVE_S = 5.0  # for the last of Ray's processes to end

CONNECT_S = 5.0  # Ray itself tries for two minutes

# In a cluster of our own nobody reads what Ray gathers, and nothing is to be scaled or shown: without all this an idle
# server takes half of its CPU time. Telemetry leaves a thread behind at each shutdown.
QUIET = {"enable_open_telemetry": False, "enable_metrics_collection": False}

# Ray looks for memory that runs short once a second, not four times.
QUIET_ENVIRONMENT = {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_memory_monitor_refresh_ms": "1000"}

HELPERS = ("monitor", "log_monitor", "dashboard")  # processes that `ray.init` starts and has no option against


def start_ray(config: Config, stack: Undo, replicas: int = 1) -> bool:
    """Connect this process to Ray; True if that started a cluster of our own, which `stack` then ends."""
    if ray.is_initialized():
        log.info("using the Ray cluster that this process is connected to")
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else ray.shutdown resets SIGTERM to its default, below Python: one that comes before our own end is done leaves
    # the rest behind. Python's faulthandler, which Ray enables, still says where a process has crashed.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "local")
    started = time.perf_counter()
    if address == "local":
        for name, value in QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cpus = max(os.cpu_count() or 1, replicas * config.tensor_parallel_size)
        # Ray's own folder grows with each start; a short name: sockets in it have paths of up to 107 characters.
        folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR"))
        stack.callback(_remove, folder)
        stack.callback(while_connected, ray.shutdown)
        with signals_wait():  # servers that were started half would stay for a minute
            _init(
                address,
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                _system_config=QUIET,
            )
            _end_helpers()
    else:
        _check_reachable(address)
        _init(address)
    log.info("Ray cluster: %s, ready in %.1f s", address, time.perf_counter() - started)
    return address == "local"


def _remove(folder: str) -> None:
    """Remove a folder that processes may still write to, until they have ended too."""
    until = time.monotonic() + REMOVE_S
    while os.path.exists(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > until:
            log.warning("Ray's folder %s cannot be removed", folder)
            return
        time.sleep(0.02)


def _end_helpers() -> None:
    """Those of this process's cluster; a Ray that has other names for them keeps them."""
    node = getattr(ray._private.worker, "_global_node", None)
    for name in HELPERS:
        end = getattr(node, f"kill_{name}", None)
        if end is None:
            log.debug("Ray %s has no kill_%s: this helper stays", ray.__version__, name)
        else:
            end(check_alive=False)


def while_connected(end: Callable[..., Any], *arguments: Any) -> None:
    """Call `end`, unless the user's own ray.shutdown() came first: the call would start Ray again."""
    if ray.is_initialized():
        end(*arguments)


def _init(address: str, **options: Any) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (RayError, ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlacementError(
            f"no Ray cluster at {address}: {reason}; see that it runs, with the same Ray and Python, and that"
            " RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are set as they are there"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has set a handler of its own, which exits; its processes end with ours in any case.
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """Raises PlacementError within CONNECT_S if nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", and what Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"no Ray cluster at {address}: {error}; see that it runs and is reachable") from error


def has_gpus() -> bool:
    """Whether the cluster that this process is connected to has any GPU."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)
