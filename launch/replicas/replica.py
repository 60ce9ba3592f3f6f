"""A replica: one group of ranks under Ray Serve, which places it, asks for its health and replaces it.

Each of Serve's calls runs one request; the tokens go to the front end over our own socket. A group that fails is not
started again here: the replica reports it and is replaced, while its requests continue in other replicas.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import msgspec
from ray import serve

from ...comm.message_sockets import Address, PushSocket, WakeupEvent
from ...runtime.config import Config
from ...runtime.limits import Limits
from ...runtime.model.checkpoint import find_model
from ...runtime.plan import StepOutput
from ...runtime.rank_location import RankLocation
from ...runtime.request import Request
from ...runtime.stats import EngineStats
from ..cluster.actor_group import forwarded_environment
from ..cluster.connection import Connection
from ..cluster.engine_thread import EngineThread
from ..cluster.ray_executor import RayExecutor
from ..cluster.stall_detector import StallDetector
from ..errors import RankFailed, ReplicaFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontendInfo:
    """The front end's addresses and settings for its replicas; travels through Ray."""

    address: Address  # its PullSocket receives the replicas' messages
    ip: str | None  # the ranks' sockets use it: the loopback address if there is only one machine
    environment: dict[str, str]  # the ranks get these variables


class ReplicaReady(msgspec.Struct, frozen=True, tag=True):
    """The report of a replica that has started."""

    replica: str
    limits: Limits
    locations: list[RankLocation]


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """The output of a replica's step, and its counters since it started."""

    replica: str
    output: StepOutput
    stats: EngineStats


encode_report = msgspec.msgpack.Encoder().encode
decode_report = msgspec.msgpack.Decoder(ReplicaReady | StepReport).decode


class Replica:
    """The deployment's class: Serve calls `run` for each request. It is the driver of its EngineThread."""

    def __init__(self, config: Config, frontend: FrontendInfo) -> None:
        logging.getLogger("lockstep").setLevel(logging.INFO)
        for name in forwarded_environment():  # Ray has set these for this process; they are not for the ranks
            del os.environ[name]
        os.environ.update(frontend.environment)
        context = serve.get_replica_context()
        self._name, self._app = context.replica_id.unique_id, context.app_name
        _, model = find_model(config)
        self._connection = Connection(config)
        self._connection.ip = frontend.ip
        self._executor = RayExecutor(config, model, self._connection)
        self._outputs = PushSocket(frontend.address)
        self._calls: dict[int, asyncio.Future[None]] = {}  # uid -> future that is done when the request has ended
        self._stall = StallDetector()
        self._failure: ReplicaFailed | None = None
        self._outputs.send(encode_report(ReplicaReady(self._name, self._executor.limits, self._executor.locations)))
        self._outputs.watch(self._end_application)
        self._thread = EngineThread(self, "lockstep-replica", self._connection.wakeup, self._connection.shutting_down)
        self._thread.start()

    async def run(self, request: Request) -> None:
        """Return when the request has ended; a call that is cancelled ends it. Raises ReplicaFailed."""
        ended = asyncio.get_running_loop().create_future()
        self._thread.post(partial(self._submit, request, ended))
        if self._failure is not None:  # set before the thread's end, after which nothing takes the request
            raise self._failure
        try:
            await ended
        except asyncio.CancelledError:
            self._thread.post(partial(self._cancel, request.uid))
            raise

    def check_health(self) -> None:
        """Raise the reason to replace this replica, if there is one; Serve calls this."""
        if self._failure is not None:
            raise self._failure
        self._stall.update(self._executor.stats.steps, len(self._calls))
        problem = self._stall.problem()
        if problem is not None:
            raise RankFailed(f"the ranks have made {problem}")

    def __del__(self) -> None:
        """End the ranks; Serve calls this at the end."""
        if hasattr(self, "_thread"):
            self._thread.stop()

    # The methods below run in the EngineThread.

    @property
    def busy(self) -> bool:
        return len(self._calls) > 0

    def poll(self, timeout_s: float) -> None:
        for output in self._executor.poll(timeout_s):
            self._outputs.send(encode_report(StepReport(self._name, output, self._executor.stats)))
            for finished in output.finished:
                self._end_call(finished.uid, None)

    def wait(self, wakeup: WakeupEvent) -> None:
        self._executor.wait(wakeup)

    def on_failure(self, error: Exception) -> bool:
        if isinstance(error, RankFailed):
            log.error("%s", error)
            self._failure = ReplicaFailed(str(error), self._name)
        else:
            log.error("the replica failed", exc_info=error)
            self._failure = ReplicaFailed(f"{type(error).__name__}: {error}", self._name)
        return False

    def detach(self) -> None:
        self._failure = self._failure or ReplicaFailed("the replica ends", self._name)

    def close(self) -> None:
        for uid in list(self._calls):
            self._end_call(uid, self._failure)
        self._executor.close()
        self._connection.close()

    def _submit(self, request: Request, ended: asyncio.Future[None]) -> None:
        self._calls[request.uid] = ended
        if self._failure is None:
            self._executor.submit([request])

    def _cancel(self, uid: int) -> None:
        if self._calls.pop(uid, None) is not None and self._failure is None:
            self._executor.cancel([uid])

    def _end_call(self, uid: int, failure: RankFailed | None) -> None:
        ended = self._calls.pop(uid, None)
        if ended is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it all calls
                ended.get_loop().call_soon_threadsafe(_settle, ended, failure)

    def _end_application(self) -> None:
        """Delete the application when its front end is gone; Serve itself would keep it."""
        if not self._connection.shutting_down.is_set():
            log.warning("the front end is gone: %s ends", self._app)
            serve.delete(self._app, _blocking=False)


def _settle(ended: asyncio.Future[None], failure: RankFailed | None) -> None:
    with suppress(asyncio.InvalidStateError):  # the call was cancelled
        if failure is None:
            ended.set_result(None)
        else:
            ended.set_exception(failure)
