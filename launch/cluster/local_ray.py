"""A Ray cluster on this machine for this process alone: on loopback addresses, with a token, in a private folder.

Ray runs below a helper process. A start of Ray cannot be interrupted, but the helper can be killed.
"""

from __future__ import annotations

import logging
import threading
import time

import ray

from ...comm.message_sockets import WakeupEvent
from ..child_process import ChildFailed
from ..errors import PlacementError, RayLost
from ..signals import Undo
from .rank_resources import LocalCluster
from .ray_client import join_on_loopback, ray_prints_nothing, token_of, while_connected
from .ray_starter import ray_starter

log = logging.getLogger(__name__)
START_S = 120.0  # Ray takes 2 s on two idle cores
POLL_S, WATCH_S = 0.1, 0.5


class WorkerEnded(PlacementError):
    """A worker has ended while Ray was starting, for which Ray would wait for ever."""


class LocalRay:
    """A local Ray cluster of this size, to which this process is connected; always call `close`.

    Only processes with its token are let in, whatever RAY_AUTH_MODE says. Raises PlacementError if Ray does not start,
    or when `shutting_down` is set meanwhile; it is WorkerEnded if the start may succeed without workers.

    When a process that the ranks need has ended, a thread kills the rest of the cluster, sets `failure` and `wakeup`.
    """

    def __init__(self, cluster: LocalCluster, shutting_down: threading.Event, wakeup: WakeupEvent) -> None:
        self.failure: RayLost | None = None
        self._wakeup, self._closing, self._lock = wakeup, threading.Event(), threading.Lock()
        with Undo() as stack:
            starter = ray_starter(cluster)
            stack.callback(starter.close)
            self._process, self.folder = starter.process, starter.folder
            starter.end_watch()
            self._processes = starter.processes
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
        log.info("Ray is ready in %.1f s, at %s", time.perf_counter() - starter.started, self.address)

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
            if problem := self._processes.worker_problem():
                raise WorkerEnded(f"{problem} while Ray was starting")
            if time.monotonic() > deadline:
                raise PlacementError(f"Ray has not started on this machine within {START_S:.0f} s; see its load")
        try:
            answer = self._process.answer(POLL_S)
        except ChildFailed as error:
            answer = {"error": f"{self._processes.problem() or 'its starter gives up'}: {error}"}
        if "error" in answer:
            raise PlacementError(f"Ray does not start on this machine: {answer['error']}")
        self._processes.update()
        self._processes.forget_workers()
        return str(answer["address"])
