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

from ...comm.message_text import first_line
from ...runtime.config import Config
from ..errors import PlacementError
from ..signals import Undo, signals_wait
from .rank_resources import LOCAL_OBJECT_STORE_BYTES
from .sockets import WakeupEvent

log = logging.getLogger(__name__)
CONNECT_S = 5.0  # Ray itself tries for two minutes
REMOVE_S = 5.0  # the last of Ray's processes may take this long to end
# Settings of a cluster that this process starts. Nothing reads its metrics, and telemetry leaves a thread behind at
# each shutdown. Ray checks for a lack of memory once a second instead of four times.
SYSTEM_CONFIG = {"enable_open_telemetry": False, "enable_metrics_collection": False}
ENVIRONMENT = {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_memory_monitor_refresh_ms": "1000"}


class Connection:
    """This process's connection to Ray, for one executor after another; `close` ends a cluster that it started.

    `wakeup` wakes the thread that waits for an executor's output; it is also set when a rank fails. A start in progress
    is aborted when `shutting_down` is set. `has_gpus` is determined once: ranks that are started again after the loss
    of a node must not run on a CPU.
    """

    def __init__(self, config: Config, replicas: int = 1) -> None:
        self.wakeup = WakeupEvent()
        self.shutting_down = threading.Event()
        with Undo() as stack:
            stack.callback(self.wakeup.close)
            is_local = start_ray(config, stack, replicas)
            self.ip = "127.0.0.1" if is_local else None  # the ranks' address; None: the address of each node
            self.has_gpus = bool(ray.cluster_resources().get("GPU", 0) > 0)
            self.has_started = False  # the ranks, at least once: after that a missing node may come back
            self._open = stack.pop_all()

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        self._open.close()


def start_ray(config: Config, stack: Undo, replicas: int = 1) -> bool:
    """Connect this process to Ray; return whether that started a local cluster, which `stack` then ends."""
    if ray.is_initialized():
        log.info("using the Ray cluster that this process is connected to")
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Otherwise ray.shutdown resets SIGTERM to its default below Python, and a SIGTERM that comes before our own end is
    # complete leaves processes behind. Python's faulthandler, which Ray enables, still reports crashes.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "local")
    started = time.perf_counter()
    if address == "local":
        _start_local(stack, num_ranks=replicas * config.tensor_parallel_size)
    else:
        _check_reachable(address)
        _init(address)
    log.info("Ray cluster: %s, ready in %.1f s", address, time.perf_counter() - started)
    return address == "local"


def while_connected(end: Callable[..., Any], *arguments: Any) -> None:
    """Call `end`, unless the user has called ray.shutdown(): the call would start Ray again."""
    if ray.is_initialized():
        end(*arguments)


def _start_local(stack: Undo, num_ranks: int) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray's default folder grows with each start. The name is short: sockets in it have paths of up to 107 characters.
    folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR"))
    stack.callback(_remove, folder)
    stack.callback(while_connected, ray.shutdown)
    sizes = {"num_cpus": max(os.cpu_count() or 1, num_ranks), "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    with signals_wait():  # servers of an interrupted start would stay for a minute
        _init("local", **sizes, include_dashboard=False, _temp_dir=folder, _system_config=SYSTEM_CONFIG)


def _remove(folder: str) -> None:
    """Remove a folder that processes may still write to, once they have ended."""
    deadline = time.monotonic() + REMOVE_S
    while os.path.exists(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > deadline:
            log.warning("Ray's folder %s cannot be removed", folder)
            return
        time.sleep(0.02)


def _init(address: str, **options: Any) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (RayError, ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise PlacementError(
            f"no Ray cluster at {address}: {first_line(error)}; see that it runs, with the same Ray and Python, and"
            " that RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are set as they are there"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has set a handler that exits; its processes end with this one in any case.
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """Raise PlacementError within CONNECT_S if no server listens at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", and addresses that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"no Ray cluster at {address}: {error}; see that it runs and is reachable") from error
