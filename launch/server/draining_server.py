"""The server of the process that has the engine: it drains at the first signal, and ends when the engine fails."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from ..engine.async_engine import AsyncEngine
from ..signals import interrupt
from .server_config import ServerConfig

log = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
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
            log_address(self._engine.name, listener)

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


def log_address(name: str, listener: socket.socket) -> None:
    """Log the address at which the model is served."""
    host, port = listener.getsockname()[:2]
    log.info("serving %s on http://%s:%d", name, f"[{host}]" if ":" in host else host, port)
