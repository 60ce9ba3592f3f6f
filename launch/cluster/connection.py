"""The connection of this process to Ray, and the local Ray cluster that it may start."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

import ray

from ...comm.message_sockets import WakeupEvent
from ...runtime.config import Config
from ..errors import PlacementError
from ..signals import Undo
from .local_ray import LOOPBACK, LocalRay
from .ray_address import LOCAL, ray_address
from .ray_client import join_ray

log = logging.getLogger(__name__)
CONNECT_S = 5.0  # Ray itself tries for two minutes


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
            self.local = start_ray(config, self.shutting_down, replicas)  # None: the cluster is not ours
            stack.callback(self._close_local)
            self.ip = LOOPBACK if self.local else None  # the ranks' address; None: the address of each node
            self.has_gpus = bool(ray.cluster_resources().get("GPU", 0) > 0)
            self.has_started = False  # the ranks, at least once: after that a missing node may come back
            self._open = stack.pop_all()

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        self._open.close()

    def _close_local(self) -> None:
        if self.local:
            self.local.close()


def start_ray(config: Config, shutting_down: threading.Event, replicas: int = 1) -> LocalRay | None:
    """Connect this process to Ray; return the local cluster that it has started for that, which must be closed."""
    if ray.is_initialized():
        log.info("using the Ray cluster that this process is connected to")
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = ray_address(config)
    if address == LOCAL:
        return LocalRay(max(os.cpu_count() or 1, replicas * config.tensor_parallel_size), shutting_down)
    started = time.perf_counter()
    _check_reachable(address)
    join_ray(address)
    log.info("Ray cluster: %s, connected in %.1f s", address, time.perf_counter() - started)
    return None


def _check_reachable(address: str) -> None:
    """Raise PlacementError within CONNECT_S if no server listens at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", and addresses that Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"no Ray cluster at {address}: {error}; see that it runs and is reachable") from error
