"""Message sockets between the front end, the leader and the followers: ZeroMQ PUSH to PULL, encrypted with CURVE.

The receiving end binds a free port of its node's address; its address and public key travel through Ray. Only a holder
of that key can connect, and no message is ever unpickled. Messages travel in frames of limited size, so that a peer
without the key cannot make the receiving end buffer more than one frame for each connection.
"""

from __future__ import annotations

import math
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

FRAME_BYTES = 1 << 16
CURVE_BYTES = 64  # a frame grows by less than this when CURVE encrypts it


class WakeupEvent:
    """An event that wakes the one thread that waits for it, from any other thread; it stays set until it is cleared.

    Unlike a threading.Event it has a file descriptor, so that a thread can wait for it and for a socket at once.
    """

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # another file may have the descriptor's number after `close`

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def wait(self) -> None:
        """Wait until the event is set, without a time limit."""
        poller = select.poll()  # select.select takes low descriptors only
        poller.register(self._fd, select.POLLIN)
        poller.poll()

    def clear(self) -> None:
        with suppress(BlockingIOError):  # it is not set
            os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the descriptor: later calls of `set` have no effect. Safe to call twice."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True)
class Address:
    """The address of a PullSocket."""

    url: str  # tcp://ip:port
    key: bytes  # public CURVE key of the PullSocket


class PullSocket:
    """The receiving end of any number of PushSockets."""

    def __init__(self, ip: str) -> None:
        public, secret = zmq.curve_keypair()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._socket.set(zmq.MAXMSGSIZE, FRAME_BYTES + CURVE_BYTES)
        self._socket.set(zmq.CURVE_SERVER, 1)
        self._socket.set(zmq.CURVE_SECRETKEY, secret)
        if ":" in ip:
            self._socket.set(zmq.IPV6, 1)
            ip = f"[{ip}]"
        port: int = self._socket.bind_to_random_port(f"tcp://{ip}")
        self.address = Address(f"tcp://{ip}:{port}", public)

    def receive(self, timeout_s: float | None, wakeup: WakeupEvent | None = None) -> list[bytes]:
        """Return all messages that have arrived, in order; wait up to timeout_s (None: without a limit) for the first.

        Returns early, and perhaps without a message, when `wakeup` is set.
        """
        messages: list[bytes] = []
        if self._poll(None if timeout_s is None else math.ceil(timeout_s * 1000), wakeup):
            with suppress(zmq.Again):
                while True:
                    messages.append(self._receive(zmq.NOBLOCK))
        return messages

    def wait(self, wakeup: WakeupEvent) -> None:
        """Wait until there is a message or `wakeup` is set, without a time limit."""
        self._poll(None, wakeup)

    def receive_one(self) -> bytes:
        """Wait for the next message, without a time limit: the process is ended if none can come."""
        return self._receive()

    def close(self) -> None:
        self._socket.close()

    def _receive(self, flags: int = 0) -> bytes:
        frames = self._socket.recv_multipart(flags)
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def _poll(self, timeout_ms: int | None, wakeup: WakeupEvent | None) -> bool:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if wakeup is not None:
            poller.register(wakeup, zmq.POLLIN)
        return bool(poller.poll(timeout_ms))


class PushSocket:
    """The sending end of one PullSocket; it does not block: messages wait in memory until the other end takes them."""

    def __init__(self, address: Address) -> None:
        public, secret = zmq.curve_keypair()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set(zmq.LINGER, 1000)  # ms: the last message is still sent when the process ends
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.TCP_KEEPALIVE, 1)  # notices a peer that has vanished with its host
        self._socket.set(zmq.CURVE_PUBLICKEY, public)
        self._socket.set(zmq.CURVE_SECRETKEY, secret)
        self._socket.set(zmq.CURVE_SERVERKEY, address.key)
        if "[" in address.url:
            self._socket.set(zmq.IPV6, 1)
        self._socket.connect(address.url)

    def watch(self, on_loss: Callable[[], None]) -> None:
        """Call `on_loss` in a thread when the other end is closed or cannot be reached; call this method once."""
        monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_MONITOR_STOPPED
        )

        def wait() -> None:
            if recv_monitor_message(monitor)["event"] != zmq.EVENT_MONITOR_STOPPED:  # `close` stops it
                on_loss()

        threading.Thread(target=wait, name="lockstep-watch-peer", daemon=True).start()

    def send(self, message: bytes) -> None:
        if len(message) <= FRAME_BYTES:
            self._socket.send(message)
        else:
            self._socket.send_multipart(
                [message[start : start + FRAME_BYTES] for start in range(0, len(message), FRAME_BYTES)]
            )

    def close(self) -> None:
        self._socket.close()
