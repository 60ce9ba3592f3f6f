"""From the command to the open port and back: start, serve, drain, end; wherever it is cut short, nothing is left."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from contextlib import suppress
from types import FrameType

import transformers.models.auto.tokenization_auto  # noqa: F401 - with the imports, while signals wait (cli.py)
import uvicorn

from ...runtime.config import Config
from ..doctor.preflight import Preflight
from ..engine.async_engine import AsyncEngine
from ..signals import interrupt, signals_wait
from .app import create_app
from .handlers import Handlers
from .http_protocol import TimeoutHTTPProtocol, allow_descriptors
from .server_config import ServerConfig

log = logging.getLogger(__name__)
LAST_WORDS_S = 2.0  # for answers that are complete but not yet sent when the service has ended
TICK_S = 1.0


def serve(config: Config, options: ServerConfig, preflight: Preflight | None) -> None:
    """Serve until a signal: the first one drains, the second one ends at once, with status 128 + its number."""
    allow_descriptors()
    with listener(options) as open_port:  # before the model is loaded: a port that is taken is known at once
        if preflight is not None:
            preflight.judge()
        service = AsyncEngine(
            config, max_restarts=options.max_restarts, replicas=options.replicas, max_queued=options.max_queued
        )
        try:
            service.start()
            ended_by = asyncio.run(serve_until_signal(service, options, open_port))
        finally:
            with signals_wait():
                asyncio.run(service.close())
    if ended_by is not None:
        sys.exit(128 + ended_by)


def listener(options: ServerConfig) -> socket.socket:
    """A bound socket; raises ValueError, in one line, where that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets NODELAY on such only
    except OSError as error:
        raise ValueError(f"host={options.host!r} is no address to listen on: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ValueError(f"cannot listen on {options.host} port {options.port}: {error.strerror}") from error
    return found


async def serve_until_signal(service: AsyncEngine, options: ServerConfig, open_port: socket.socket) -> int | None:
    """Answer requests until the service has been drained; returns the signal that cut that short, if one did."""
    if not options.api_key and open_port.getsockname()[0] not in ("127.0.0.1", "::1"):
        log.warning("everybody who reaches %s can use this server: there is no --api-key", options.host)
    server = Server(create_uvicorn_config(service, options), service, options.drain_timeout)
    await server.serve(sockets=[open_port])
    return server.ended_by


def create_uvicorn_config(service: AsyncEngine, options: ServerConfig) -> uvicorn.Config:
    gateway = Handlers(service, options)
    return uvicorn.Config(
        create_app(gateway, options.api_key or []), http=TimeoutHTTPProtocol, ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False,
        callback_notify=gateway.pulse.look, timeout_notify=1, timeout_graceful_shutdown=int(LAST_WORDS_S),
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn, which goes on answering (health with 503, new requests with 503) while the service drains."""

    def __init__(self, config: uvicorn.Config, service: AsyncEngine, drain_timeout: float) -> None:
        super().__init__(config)
        self.ended_by: int | None = None
        self._service, self._drain_timeout = service, drain_timeout
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends = asyncio.Event()

    async def main_loop(self) -> None:
        """In place of uvicorn's, which looks ten times a second; what it does then it does once a second."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ends.wait(), TICK_S)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for open_port in sockets or []:
            host, port = open_port.getsockname()[:2]
            log.info("serving %s on http://%s:%d", self._service.name, f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's: runs as a signal handler."""
        if self._loop is None:
            interrupt(sig)  # not serving yet
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, sig: int) -> None:
        if self._draining is None:
            log.info(
                "%s: draining for up to %.0f s; again to end at once", signal.Signals(sig).name, self._drain_timeout
            )
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self.ended_by = sig
            self.force_exit = True
            self._end()

    async def _drain(self) -> None:
        try:
            await self._service.close(self._drain_timeout)
        finally:
            self._end()

    def _end(self) -> None:
        self.should_exit = True
        self._ends.set()
