"""`lockstep serve`: bind the port, start the engine, serve until a signal, drain, and stop.

Whenever a signal comes, the ranks are stopped and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from functools import partial
from importlib import metadata
from types import FrameType
from typing import Any, TypeVar, cast

import transformers.models.auto.tokenization_auto  # noqa: F401 - imported here, where the command holds signals back
import uvicorn

from ...runtime.config import Config
from ..doctor.preflight import Preflight
from ..engine.async_engine import AsyncEngine
from ..errors import EngineFailed
from ..signals import interrupt, signals_wait
from ..standard_streams import Throttle
from .app import create_app
from .handlers import Handlers
from .http_protocol import TimeoutHTTPProtocol, raise_file_limit
from .server_config import ServerConfig, ServerLimits, read_template

log = logging.getLogger(__name__)
Result = TypeVar("Result")
STRANGERS = ("uvicorn.error", "asyncio")  # loggers of messages that clients cause
SHUTDOWN_S = 2  # after the engine stops, complete answers have this time to be sent


def serve(config: Config, options: ServerConfig, preflight: Preflight | None) -> None:
    """Serve until a signal: the first one drains, the second one stops at once with status 128 + its number.

    Raises EngineFailed when the engine has failed for good, unless options.keep_alive_on_engine_death is set.
    """
    raise_file_limit()
    chat_template = read_template(options.chat_template)
    with bind(options) as listener:  # before the model is loaded: a port in use is reported at once
        if preflight is not None:
            preflight.verify()
            preflight.close()  # it has ended, and is waited for
        engine = AsyncEngine(
            config, max_restarts=options.max_restarts, replicas=options.replicas, max_queued=options.max_queued,
            chat_template=chat_template,
        )  # fmt: skip
        try:
            engine.start()
            gc.collect()
            gc.freeze()  # imports leave so many objects behind that a full collection would stop all streams for 50 ms
            signal_number = run_loop(serve_until_signal(engine, options, listener))
        finally:
            with signals_wait():
                asyncio.run(engine.close())
    if signal_number is not None:
        sys.exit(128 + signal_number)


def run_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine like asyncio.run, on uvloop's event loop where that is installed."""
    try:
        import uvloop
    except ImportError:
        log.warning("event loop: asyncio; pip install uvloop for a faster one")
        return asyncio.run(main)
    log.info("event loop: uvloop %s", metadata.version("uvloop"))
    return uvloop.run(main)


def bind(options: ServerConfig) -> socket.socket:
    """Return a socket bound to the server's address; raises ValueError with a message of one line."""
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets NODELAY for TCP only
    except OSError as error:
        raise ValueError(f"host={options.host!r} is not an address to listen on: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {options.host} port {options.port}: {error.strerror}") from error
    return listener


async def serve_until_signal(engine: AsyncEngine, options: ServerConfig, listener: socket.socket) -> int | None:
    """Serve until the engine has drained; returns the number of a second signal that ended the draining early."""
    if not options.api_key and listener.getsockname()[0] not in ("127.0.0.1", "::1"):
        log.warning("every client that reaches %s can use this server: there is no --api-key", options.host)
    server = Server(create_uvicorn_config(engine, options), engine, options)
    await server.serve(sockets=[listener])
    if server.failure:
        raise EngineFailed(server.failure)
    return server.forced_by


def create_uvicorn_config(
    engine: AsyncEngine, options: ServerConfig, limits: ServerLimits | None = None
) -> uvicorn.Config:
    """Return uvicorn's configuration with the application."""
    for name in STRANGERS:
        logging.getLogger(name).addFilter(Throttle())
    limits = limits or ServerLimits()
    handlers = Handlers(engine, options, limits)
    protocol = cast("type[asyncio.Protocol]", partial(TimeoutHTTPProtocol, limits=limits))
    return uvicorn.Config(
        create_app(handlers, options), http=protocol, ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, callback_notify=handlers.update_stall_detector, timeout_notify=1,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn's server, which keeps answering (/health and new requests with 503) while the engine drains."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, options: ServerConfig) -> None:
        super().__init__(config)
        self.forced_by: int | None = None  # the signal that ended the draining early
        self.failure = ""  # the reason of the engine's failure, if that ends the server
        self._engine, self._drain_timeout = engine, options.drain_timeout
        self._outlives_engine = options.keep_alive_on_engine_death
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and log the addresses."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            log.info("serving %s on http://%s:%d", self._engine.name, f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end, for uvicorn ten times a second; when the engine has failed, a supervisor must act."""
        health = self._engine.health
        if health.state == "failed" and not self._outlives_engine:
            self.failure = health.reason
        return await super().on_tick(counter) or bool(self.failure)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, abort requests at the second; runs as a signal handler in place of uvicorn's."""
        if self._loop is None:
            interrupt(sig)  # the server is not serving yet
        self._loop.call_soon_threadsafe(self._on_signal, sig)

    def _on_signal(self, number: int) -> None:
        if self._draining is None:
            log.info(
                "%s: draining for up to %.0f s; send it again to stop at once",
                signal.Signals(number).name, self._drain_timeout,
            )  # fmt: skip
            self._draining = asyncio.ensure_future(self._drain(self._drain_timeout))
        elif self.forced_by is None:
            self.forced_by = number
            before, self._draining = self._draining, asyncio.ensure_future(self._drain(0.0))
            before.cancel()
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self, timeout_s: float) -> None:
        try:
            await self._engine.close(timeout_s)
        finally:
            if self._draining is asyncio.current_task():  # not the one that a second signal has cancelled
                self.should_exit = True
