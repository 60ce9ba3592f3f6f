"""Messages over a connected Unix socket, each after its length, for asyncio."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

LENGTH = struct.Struct("!I")


class MessageLink(asyncio.Protocol):
    """One end of a socket pair. Messages are bytes; `send` never blocks, and what cannot be sent yet waits in memory.

    on_message  called with each message, in the order of their arrival
    on_loss     called once, when the other end is closed
    """

    def __init__(self, on_message: Callable[[bytes], None], on_loss: Callable[[], None]) -> None:
        self._on_message, self._on_loss = on_message, on_loss
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()

    async def connect(self, end: socket.socket) -> None:
        """Take over a socket."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def send(self, message: bytes) -> None:
        """Send a message, unless the other end is closed."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(LENGTH.pack(len(message)) + message)

    def close(self) -> None:
        """Close this end, after what was sent."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is of another class

    def data_received(self, data: bytes) -> None:
        received, start = self._received, 0
        received += data
        while len(received) - start >= LENGTH.size:
            end = start + LENGTH.size + LENGTH.unpack_from(received, start)[0]
            if len(received) < end:
                break
            self._on_message(bytes(received[start + LENGTH.size : end]))
            start = end
        del received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_loss()
