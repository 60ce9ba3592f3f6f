"""A replica: one group of ranks under Ray Serve, which places it, asks for its health and replaces it.

Serve's calls admit requests and end with them; the tokens go to the front end over our own socket. As in service.py,
one thread drives the executor and takes commands through a queue and a bell. A group that fails is not started again
here: the replica says so and is replaced, while the front end has its requests go on elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ray import serve

from ...runtime.checkpoint import find_model
from ...runtime.config import Config
from ...runtime.request import Request
from ..cluster.actor_group import forwarded
from ..cluster.connection import Connection
from ..cluster.ray_executor import RayExecutor
from ..cluster.sockets import PushSocket
from ..errors import RankFailed
from .replica_messages import FrontendInfo, ReplicaReady, StepReport, encode

log = logging.getLogger(__name__)
WAIT_S = 60.0  # for a step; the bell comes before
STALL_S = 30.0  # live requests without a step, as /health has it


class Replica:
    """The deployment's class; `run` is called for each request."""

    def __init__(self, config: Config, front: FrontendInfo) -> None:
        logging.getLogger("lockstep").setLevel(logging.INFO)
        for name in forwarded():  # Ray's own choices for this process are none for the ranks
            del os.environ[name]
        os.environ.update(front.environment)
        context = serve.get_replica_context()
        self._name, self._app = context.replica_id.unique_id, context.app_name
        _, model = find_model(config)
        self._connection = Connection(config)
        self._connection.ip = front.ip
        self._executor = RayExecutor(config, model, self._connection)
        self._outbox = PushSocket(front.inbox)
        self._commands: deque[Callable[[], None]] = deque()
        self._ends: dict[int, asyncio.Future[None]] = {}  # of the calls, by the request's uid
        self._moved = time.monotonic()  # when a step ended, or there was nothing to do
        self._failure: RankFailed | None = None
        self._outbox.send(encode(ReplicaReady(self._name, self._executor.limits, self._executor.locations)))
        self._lifeline = socket.create_connection(front.lifeline)
        self._lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=self._watch, name="lockstep-lifeline", daemon=True).start()
        self._thread = threading.Thread(target=self._work, name="lockstep-replica", daemon=True)
        self._thread.start()

    async def run(self, request: Request) -> None:
        """Returns when the request has ended; a call that is cancelled ends it."""
        ended = asyncio.get_running_loop().create_future()
        self._post(partial(self._admit, request, ended))
        try:
            await ended
        except asyncio.CancelledError:
            self._post(partial(self._cancel, request.uid))
            raise

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica after an exception."""
        if self._failure is not None:
            raise self._failure
        silent = time.monotonic() - self._moved
        if self._ends and silent > STALL_S:
            raise RankFailed(f"the ranks have made no step for {silent:.0f} s although requests are live")

    def __del__(self) -> None:
        """Called by Serve at the end."""
        if hasattr(self, "_thread"):
            self._connection.leaving.set()
            self._connection.bell.ring()
            self._thread.join()

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._connection.bell.ring()

    # -- the thread

    def _work(self) -> None:
        try:
            while not self._connection.leaving.is_set():
                self._turn()
        except RankFailed as error:
            log.error("%s", error)
            self._failure = error
        finally:
            self._failure = self._failure or RankFailed("the replica ends")
            while self._commands:
                self._commands.popleft()()
            for uid in list(self._ends):
                self._tell(uid, self._failure)
            self._executor.close()
            self._connection.close()

    def _turn(self) -> None:
        while self._commands:
            self._commands.popleft()()
        for output in self._executor.poll(WAIT_S if self._ends else 0.0):
            self._outbox.send(encode(StepReport(self._name, output, self._executor.stats)))
            self._moved = time.monotonic()
            for finished in output.finished:
                self._tell(finished.uid, None)
        if not self._ends:
            self._connection.bell.wait()
        self._connection.bell.clear()

    def _admit(self, request: Request, ended: asyncio.Future[None]) -> None:
        if not self._ends:
            self._moved = time.monotonic()
        self._ends[request.uid] = ended
        if self._failure is None:
            self._executor.submit([request])

    def _cancel(self, uid: int) -> None:
        if self._ends.pop(uid, None) is not None and self._failure is None:
            self._executor.cancel([uid])

    def _tell(self, uid: int, failure: RankFailed | None) -> None:
        ended = self._ends.pop(uid, None)
        if ended is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it all calls
                ended.get_loop().call_soon_threadsafe(_settle, ended, failure)

    def _watch(self) -> None:
        """Nobody needs the application when its front end is gone: Serve itself would keep it for ever."""
        with suppress(OSError):
            self._lifeline.recv(1)
        if not self._connection.leaving.is_set():
            log.warning("the front end is gone: %s ends", self._app)
            serve.delete(self._app, _blocking=False)


def _settle(ended: asyncio.Future[None], failure: RankFailed | None) -> None:
    if ended.done():  # the call was cancelled
        return
    if failure is None:
        ended.set_result(None)
    else:
        ended.set_exception(failure)
