"""The socket of the server's address: bound before anything is started, and listening when the model is loaded."""

from __future__ import annotations

import errno
import socket

from .server_config import ServerConfig


def bind(options: ServerConfig) -> socket.socket:
    """Return a socket bound to the server's address; raises ValueError with a message of one line.

    No other process can bind the address, although the socket does not listen yet: with SO_REUSEADDR two sockets could
    have one address until one of them listens. An address that closed connections have left behind needs that option.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets NODELAY for TCP only
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of the name is empty or too long
        raise ValueError(f"host={options.host!r} is not an address to listen on: {error}") from error
    try:
        try:
            bound.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            allow_reuse(bound)
            bound.bind(address)
    except OSError as error:
        bound.close()
        wrong = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        reason = f"cannot listen on {options.host} port {options.port}: {error.strerror}"
        raise ValueError(f"{reason}; choose another --{wrong}") from error
    return bound


def allow_reuse(bound: socket.socket) -> None:
    """Let the next server bind this address while connections of this one are in TIME_WAIT; call it before listening.

    The connections inherit the option.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
