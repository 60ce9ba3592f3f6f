"""Message sockets between the front end, the leader and the followers: ZeroMQ PUSH to PULL, encrypted with CURVE.

The receiving end binds a free port of its node's address; its address and public key travel through Ray. Only who got
the key from there can connect, and nothing that arrives is ever unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass

import zmq


@dataclass(frozen=True)
class Address:
    """Where an Inbox listens."""

    url: str  # tcp://ip:port
    key: bytes  # public CURVE key of the listener


class Inbox:
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

    def receive(self, timeout_s: float | None) -> list[bytes]:
        """All messages that are there, in order of arrival; waits up to timeout_s (None: for ever) for the first."""
        messages: list[bytes] = []
        if self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            try:
                while True:
                    messages.append(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                pass
        return messages

    def receive_one(self) -> bytes:
        """The next message, however long it takes: the caller's owner ends it if nothing can come any more."""
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """Sends to one Inbox; never blocks, messages wait in memory until the other end takes them."""

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
