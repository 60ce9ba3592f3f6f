"""The API server processes of a server: started together, given connections in turn, and replaced when they end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from dataclasses import replace

import msgspec

from ...comm.message_text import counted
from ..child_process import ChildFailed, ChildProcess, calling
from ..engine.async_engine import AsyncEngine
from ..errors import EngineFailed
from .api_server_messages import Shutdown, encode
from .api_server_process import ApiServerStart, main
from .engine_gateway import EngineGateway
from .local_client import LocalEngineClient
from .message_link import MessageLink
from .request_metrics import RequestMetrics
from .server_config import ServerConfig, ServerLimits
from .uvicorn_setup import SHUTDOWN_S

log = logging.getLogger(__name__)
START_S = 120.0  # longest start on a busy machine
SILENCE_S = 30  # a process that sends nothing for so long is killed; it sends its metrics once a second
METRICS_S = 1.0  # longest wait for the metrics of a process; then its last ones count
END_S = SHUTDOWN_S + 5.0  # after Shutdown a process may take this long to end
CAUSE_S = 2.0  # longest wait for the exit status of a process that has closed its sockets
RESTART_WINDOW_S = 600.0


class ApiServerProcess:
    """One process, which imports its modules from the constructor on and serves after `start`."""

    def __init__(self, number: int) -> None:
        self.number, self.num_passed = number, 0  # connections
        link, self._child_link = socket.socketpair()
        connections, self._child_connections = socket.socketpair()
        connections.setblocking(False)
        self._link_end, self._connections = link, connections
        descriptors = [self._child_link.fileno(), self._child_connections.fileno()]
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # the engine's process has its warnings
        self._process = ChildProcess(
            calling(main), environment=environment, inherited=descriptors, inherits_stderr=True
        )
        self.pid = self._process.pid
        self.gateway: EngineGateway
        self._link: MessageLink
        self.ended = asyncio.Event()

    def __str__(self) -> str:
        return f"API server {self.number} (pid {self.pid})"

    @property
    def num_connections(self) -> int:
        """The connections that it has been given and that have not ended."""
        return self.num_passed - self.gateway.num_closed

    async def start(self, start: ApiServerStart, pool: ApiServerPool) -> None:
        """Wait until it serves. Raises ValueError for a user's mistake, and EngineFailed if it ends or is silent."""
        self._link = MessageLink(lambda message: self.gateway.receive(message), lambda: pool.on_loss(self))
        self.gateway = EngineGateway(pool.client, pool.all_metrics, self._link.send)
        await self._link.connect(self._link_end)
        ends = self._child_link, self._child_connections
        start = msgspec.structs.replace(start, link=ends[0].fileno(), connections=ends[1].fileno())
        try:
            mistake = await asyncio.to_thread(self._process.request, msgspec.json.encode(start), START_S)
        except (ChildFailed, TimeoutError) as error:
            raise EngineFailed(f"{self} did not start: {error}") from None
        finally:
            for end in ends:  # this process must see when the other one closes them
                end.close()
        if mistake is not None:
            raise ValueError(mistake)

    def take(self, connection: socket.socket) -> bool:
        """Pass a connection on; return whether the process could be given one more."""
        try:
            socket.send_fds(self._connections, [b"c"], [connection.fileno()])
        except OSError:  # full, or the process has ended
            return False
        self.num_passed += 1
        return True

    def cause_of_end(self) -> str:
        """Return how the process has ended; for a thread."""
        try:
            self._process.answer(CAUSE_S)
        except (ChildFailed, TimeoutError) as error:
            return str(error)
        return "it has closed its sockets"

    async def wait_for_end(self) -> None:
        """Wait until the process has closed its link, and its exit a little longer."""
        await self.ended.wait()
        await asyncio.to_thread(self.cause_of_end)

    def shut_down(self) -> None:
        """Let the process complete the answers that have all their events, and end."""
        self._link.send(encode(Shutdown()))

    def close(self) -> None:
        """Kill the process; safe to call twice."""
        self._process.close()
        for end in (self._child_link, self._child_connections, self._connections):
            end.close()


class ApiServerPool:
    """`count` processes. Use `start`, `give` and `tick` on the event loop; `close` always.

    failure  why the server must end; empty until processes have ended more than options.max_restarts times within
             RESTART_WINDOW_S
    """

    client: LocalEngineClient

    def __init__(self, count: int, options: ServerConfig) -> None:
        self.failure = ""
        self._options = options
        limits = ServerLimits()
        self._limits = replace(limits, max_bodies=max(1, limits.max_bodies // count))  # the memory of all together
        self._start_message: ApiServerStart
        self._processes: dict[int, ApiServerProcess] = {}  # by number, those that start or have ended too
        self._serving: list[ApiServerProcess] = []
        self._ended_metrics = RequestMetrics()  # of processes that have ended
        self._failed_at: list[float] = []  # times of time.monotonic, within the window
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_ending = False
        try:
            for number in range(1, count + 1):
                self._processes[number] = ApiServerProcess(number)
        except OSError:
            self.close()
            raise

    async def start(self, engine: AsyncEngine) -> None:
        """Let all processes serve an engine that has been started; raises as ApiServerProcess.start."""
        self.client = LocalEngineClient(engine, self._options, self._limits)
        level = logging.getLevelName(log.getEffectiveLevel()).lower()
        self._start_message = ApiServerStart(
            -1, -1, os.fspath(engine.folder), engine.chat_template, engine.name, self.client.started_at, engine.limits,
            engine.default_params, self._options, self._limits, level,
        )  # fmt: skip
        await asyncio.gather(*(process.start(self._start_message, self) for process in self._processes.values()))
        self._serving = list(self._processes.values())

    def give(self, connection: socket.socket) -> bool:
        """Pass a connection to the process with the fewest; return False if none can take it now."""
        return any(process.take(connection) for process in sorted(self._serving, key=lambda p: p.num_connections))

    async def tick(self) -> None:
        """Do what is due once a second: kill processes that are silent."""
        await self.client.tick()
        for process in list(self._serving):
            process.gateway.silent_s += 1
            if process.gateway.silent_s == SILENCE_S:
                log.error("%s has sent nothing for %d s and is killed", process, SILENCE_S)
                await asyncio.to_thread(process.close)

    async def all_metrics(self) -> RequestMetrics:
        """Return the metrics of the requests of all processes since the start of the server."""
        waits = [asyncio.ensure_future(process.gateway.refresh_metrics()) for process in self._serving]
        if waits:
            await asyncio.wait(waits, timeout=METRICS_S)
        for wait in waits:
            wait.cancel()
        return sum((process.gateway.metrics for process in self._serving), self._ended_metrics)

    def on_loss(self, process: ApiServerProcess) -> None:
        """Note that a process has closed its link; unless that is in order, another one takes its place."""
        process.ended.set()
        process.gateway.close()
        if process in self._serving:
            self._serving.remove(process)
            self._ended_metrics += process.gateway.metrics
            if not self._is_ending:
                task = asyncio.ensure_future(self._replace(process))
                self._replacing.add(task)
                task.add_done_callback(self._replacing.discard)

    async def end(self) -> None:
        """Shut all processes down and wait until they have ended, up to END_S; then call `close`."""
        self._is_ending = True
        processes = list(self._serving)
        for process in processes:
            process.shut_down()
        ends = [asyncio.ensure_future(process.wait_for_end()) for process in processes]
        if ends:
            await asyncio.wait(ends, timeout=END_S)

    def close(self) -> None:
        """Kill the processes that have not ended; safe to call twice."""
        self._is_ending = True
        for process in self._processes.values():
            process.close()

    async def _replace(self, lost: ApiServerProcess) -> None:
        """Start a process in place of one that has ended, unless that has happened too often."""
        cause = await asyncio.to_thread(lost.cause_of_end)
        await asyncio.to_thread(lost.close)
        reason = f"{lost} has ended with {counted(lost.num_connections, 'connection')}: {cause}"
        while not self._is_ending:
            now, limit = time.monotonic(), self._options.max_restarts
            self._failed_at = [*(then for then in self._failed_at if now - then < RESTART_WINDOW_S), now]
            if len(self._failed_at) > limit:
                self.failure = f"{reason}; given up after {counted(limit, 'restart')} within {RESTART_WINDOW_S:g} s"
                log.error("%s", self.failure)
                return
            log.error("%s; another one is started", reason)
            process = self._processes[lost.number] = ApiServerProcess(lost.number)
            try:
                await process.start(self._start_message, self)
            except (EngineFailed, ValueError, OSError) as error:
                reason = str(error)
                await asyncio.to_thread(process.close)
            else:
                self._serving.append(process)
                log.info("%s serves after %.1f s", process, time.monotonic() - now)
                return
