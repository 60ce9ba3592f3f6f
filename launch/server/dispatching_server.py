"""The server of the engine's process when other processes answer: it accepts connections and passes them on."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import Receive, Scope, Send

from ..engine.async_engine import AsyncEngine
from .api_server_pool import ApiServerPool
from .draining_server import DrainingServer, log_address
from .server_config import ServerConfig

log = logging.getLogger(__name__)
BACKLOG = 2048
MOST_AT_ONCE = 64  # connections accepted in one turn of the loop
PAUSE_S = 0.02  # until the next attempt to accept or to pass on a connection, after one that has failed


async def _no_application(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotImplementedError("connections are passed to other processes")


class DispatchingServer(DrainingServer):
    """A DrainingServer without HTTP: each connection goes to the process of `pool` with the fewest."""

    def __init__(self, engine: AsyncEngine, options: ServerConfig, pool: ApiServerPool) -> None:
        config = uvicorn.Config(
            _no_application, ws="none", lifespan="off", log_config=None, callback_notify=pool.tick, timeout_notify=1
        )
        super().__init__(config, engine, options)
        self._pool = pool
        self._listener: socket.socket
        self._accepted: socket.socket | None = None  # waits for a process

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the processes, listen and log the address."""
        assert sockets is not None
        (self._listener,) = sockets
        await self._pool.start(self._engine)
        self._loop = asyncio.get_running_loop()
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self.started = True
        log_address(self._engine.name, self._listener)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: also when the processes have ended too often."""
        is_ending = await super().on_tick(counter)
        self.failure = self.failure or self._pool.failure
        return is_ending or bool(self.failure)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, and let the processes complete their answers; a third signal cuts them off."""
        assert self._loop is not None
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._accepted is not None:
            self._accepted.close()
        ending = asyncio.ensure_future(self._pool.end())
        while not ending.done() and not self.force_exit:
            await asyncio.wait((ending,), timeout=0.1)
        ending.cancel()
        await asyncio.to_thread(self._pool.close)  # also ends the threads that wait for a process to start

    def _accept(self) -> None:
        """Accept the connections that wait, and pass them on."""
        for _ in range(MOST_AT_ONCE):
            try:
                connection = self._accepted or self._listener.accept()[0]
            except BlockingIOError:
                return
            except OSError as error:  # too many open files, or the client is gone
                log.warning("a connection cannot be accepted: %s", error)
                self._pause()
                return
            self._accepted = None if self._pool.give(connection) else connection
            if self._accepted is not None:
                self._pause()
                return
            connection.close()

    def _pause(self) -> None:
        """Stop accepting for a moment: new connections wait in the listener's queue."""
        assert self._loop is not None
        self._loop.remove_reader(self._listener)
        self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._loop is not None and self._listener.fileno() != -1:
            self._loop.add_reader(self._listener, self._accept)
            self._accept()
