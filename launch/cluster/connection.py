"""The connection of this process to Ray, and the local Ray cluster that it may start."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray

from ...comm.message_sockets import WakeupEvent
from ...runtime.config import Config
from ..errors import PlacementError, RankFailed, RayLost
from ..signals import Undo
from .local_ray import LocalRay, WorkerEnded
from .rank_resources import local_cluster
from .ray_address import LOCAL, ray_address
from .ray_client import while_connected
from .ray_starter import LOOPBACK
from .remote_ray import RemoteRay

log = logging.getLogger(__name__)


class Connection:
    """This process's connection to Ray, for one executor after another; `close` ends a cluster that it started.

    `wakeup` wakes the thread that waits for an executor's output; it is also set when a rank fails. A start in progress
    is aborted when `shutting_down` is set. `has_gpus` is determined once: ranks that are started again after the loss
    of a node must not run on a CPU. `check` raises when Ray is lost; `restore` then starts a local cluster, or joins
    another one, again.
    """

    def __init__(self, config: Config, replicas: int = 1) -> None:
        self.wakeup = WakeupEvent()
        self.shutting_down = threading.Event()
        self._config, self._replicas = config, replicas
        with Undo() as stack:
            stack.callback(self.wakeup.close)
            self._ray = self._start_ray()
            stack.callback(self._close_ray)
            # The address of all ranks; None: each has the address of its node.
            self.ip = LOOPBACK if isinstance(self._ray, LocalRay) else None
            self.has_gpus = bool(ray.cluster_resources().get("GPU", 0) > 0)
            self.ranks_have_started = False  # once they have, a missing node may come back
            self._open = stack.pop_all()

    @property
    def failure(self) -> RayLost | None:
        """The reason why Ray is lost, once a thread has noticed it; wakeup is set then."""
        return self._ray.failure if self._ray else None

    def is_lost(self) -> bool:
        """Return whether Ray is lost at this moment; not for use in a step, although it is fast."""
        return self._ray is not None and self._ray.check() is not None

    def check(self) -> None:
        """Raise RayLost if Ray is lost, and RankFailed if the server shuts down."""
        if self.shutting_down.is_set():
            raise RankFailed("the start was aborted: the server is shutting down")
        if self.is_lost():
            assert self.failure is not None
            raise self.failure

    @contextmanager
    def naming_loss(self) -> Iterator[None]:
        """Raise what `check` raises in place of an exception of the block: a loss of Ray is the cause of the others."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def while_usable(self, end: Callable[..., Any], *arguments: Any) -> None:
        """Call `end`, unless Ray is lost or the user has shut it down: the call would hang, or start Ray again."""
        if not self.is_lost():
            while_connected(end, *arguments)

    def restore(self) -> None:
        """Connect to Ray again if it is lost; raises RankFailed if that fails, and may be called again."""
        if self.is_lost():
            self._close_ray()
            try:
                self._ray = self._start_ray()
            except PlacementError as error:
                raise RankFailed(str(error)) from error

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        self._open.close()

    def _start_ray(self) -> LocalRay | RemoteRay | None:
        return start_ray(self._config, self.shutting_down, self.wakeup, self._replicas)

    def _close_ray(self) -> None:
        if self._ray:
            self._ray.close()


def start_ray(
    config: Config, shutting_down: threading.Event, wakeup: WakeupEvent, replicas: int = 1
) -> LocalRay | RemoteRay | None:
    """Connect this process to Ray; return the connection, which must be closed, or None if the process has one."""
    if ray.is_initialized():
        log.info("using the Ray cluster that this process is connected to")
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = ray_address(config)
    if address == LOCAL:
        cluster = local_cluster(config, replicas)
        try:
            return LocalRay(cluster, shutting_down, wakeup)
        except WorkerEnded as error:
            log.warning("%s; starting it again, without workers", error)
            return LocalRay(replace(cluster, starts_workers=False), shutting_down, wakeup)
    return RemoteRay(address, wakeup)
