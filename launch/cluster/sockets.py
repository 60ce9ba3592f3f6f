"""Message sockets between the front end, the leader and the followers: ZeroMQ PUSH to PULL, encrypted with CURVE.

The receiving end binds a free port of its node's address; its address and public key travel through Ray. Only who got
the key from there can connect, and nothing that arrives is ever unpickled.
"""

from __future__ import annotations

import math
import os
import select
import threading
from contextlib import suppress
from dataclasses import dataclass

import zmq


class WakeupEvent:
    """Wakes the one thread that waits for it, from any other; what rang once stays ringing until it is cleared."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = threading.Lock()  # a closed descriptor's number may be somebody else's by now

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        with self._open:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def wait(self) -> None:
        """Wait until somebody rings, however long it takes."""
        poller = select.poll()  # select.select takes low descriptors only
        poller.register(self._fd, select.POLLIN)
        poller.poll()

    def clear(self) -> None:
        with suppress(BlockingIOError):  # it did not ring
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """From now on nobody hears it; safe to call twice."""
        with self._open:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Address:
    """Where an PullSocket listens."""

    url: str  # tcp://ip:port
    key: bytes  # public CURVE key of the listener


class PullSocket:
    """Receives from any number of Outboxes."""

    def __init__(self, ip: str) -> None:
        public, secret = zmq.curve_keypair()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, secret)
        if ":" in ip:
            self._socket.set(zmq.IPV6, 1)
            ip = f"[{ip}]"
        port: int = self._socket.bind_to_random_port(f"tcp://{ip}")
        self.address = Address(f"tcp://{ip}:{port}", public)

    def receive(self, timeout_s: float | None, bell: WakeupEvent | None = None) -> list[bytes]:
        """All messages that are there, in order of arrival; waits up to timeout_s (None: for ever) for the first.

        Returns early, and perhaps without any, when the bell rings.
        """
        messages: list[bytes] = []
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if bell is not None:
            poller.register(bell, zmq.POLLIN)
        if poller.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)):
            try:
                while True:
                    messages.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                pass
        return messages

    def wait(self, bell: WakeupEvent) -> None:
        """Wait until there is a message or the bell rings, however long it takes."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        poller.poll()

    def receive_one(self) -> bytes:
        """The next message, however long it takes: the caller's owner ends it if nothing can come any more."""
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close()


class PushSocket:
    """Sends to one PullSocket; never blocks, messages wait in memory until the other end takes them."""

    def __init__(self, address: Address) -> None:
        public, secret = zmq.curve_keypair()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set(zmq.LINGER, 1000)  # ms: the last message still goes out when the process ends
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.CURVE_PUBLICKEY, public)
        self._socket.set(zmq.CURVE_SECRETKEY, secret)
        self._socket.set(zmq.CURVE_SERVERKEY, address.key)
        if "[" in address.url:
            self._socket.set(zmq.IPV6, 1)
        self._socket.connect(address.url)

    def send(self, message: bytes) -> None:
        self._socket.send(message)

    def close(self) -> None:
        self._socket.close()
