"""The connection of this process to a Ray cluster that others have started, and the watch of its GCS.

Ray itself ends a process whose GCS has been silent for a minute, without a word to its clients.
"""

from __future__ import annotations

import logging
import socket
import threading
import time

import ray

from ...comm.message_sockets import WakeupEvent
from ..errors import PlacementError, RayLost
from ..open_files import require_open_files
from .cluster_probe import probe_cluster
from .ray_client import join_ray, while_connected

log = logging.getLogger(__name__)
CONNECT_S = 5.0  # Ray itself tries for two minutes
WATCH_S = 2.0
LOST_S = 30.0  # steps need no GCS, and one with a database may come back


class RemoteRay:
    """The cluster at `address`, HOST:PORT or "auto"; always call `close`.

    When its GCS cannot be reached for LOST_S, a thread sets `failure` and then `wakeup`. Raises PlacementError if there
    is no cluster.
    """

    def __init__(self, address: str, wakeup: WakeupEvent) -> None:
        self.failure: RayLost | None = None
        self._wakeup, self._closing = wakeup, threading.Event()
        started = time.perf_counter()
        require_open_files()
        if address != "auto" and (problem := _problem(address)):
            raise PlacementError(f"no Ray cluster at {address}: {problem}; see that it runs and is reachable")
        probe_cluster(address)
        join_ray(address)
        self.address: str = ray.get_runtime_context().gcs_address
        log.info("Ray cluster: %s, connected in %.1f s", address, time.perf_counter() - started)
        self._watcher = threading.Thread(target=self._watch, name="lockstep-ray-watch", daemon=True)
        self._watcher.start()

    def check(self) -> RayLost | None:
        """Return `failure`, which is set if the GCS cannot be reached now; waits for it up to CONNECT_S."""
        if self.failure is None and (problem := _problem(self.address)):
            self._fail(problem)
        return self.failure

    def close(self) -> None:
        """End the watch; the process stays connected unless Ray is lost. Safe to call twice."""
        self._closing.set()
        self._watcher.join()
        if self.failure is not None:
            while_connected(ray.shutdown)

    def _watch(self) -> None:
        reached_at, is_silent = time.monotonic(), False
        while self.failure is None and not self._closing.wait(WATCH_S):
            problem = _problem(self.address)
            if problem is None:
                reached_at, is_silent = time.monotonic(), False
            elif time.monotonic() - reached_at > LOST_S:
                self._fail(f"{problem}, for {LOST_S:.0f} s")
            elif not is_silent:
                is_silent = True
                log.warning("no Ray cluster at %s: %s; waiting up to %.0f s for it", self.address, problem, LOST_S)

    def _fail(self, problem: str) -> None:
        self.failure = RayLost(f"the Ray cluster at {self.address} is lost: {problem}")
        self._wakeup.set()


def _problem(address: str) -> str | None:
    """Return why no connection to HOST:PORT can be made within CONNECT_S, or None."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        return str(error)
    return None
