"""Peers without a key that connect to a port of ours and send what does harm where nothing is checked."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

MIB = 1 << 20
# ZMTP 3.0: signature, version, mechanism, and as a client.
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
TORCH_VALIDATE = bytes([11]) + struct.pack("<I", 0x3C85F7CE)  # the first message to torch's TCPStore
TORCH_SET = bytes([0]) + struct.pack("<Q", 3) + b"key" + struct.pack("<Q", 800 * MIB)


def send(address: tuple[str, int], start: bytes, megabytes: int = 0) -> int:
    """Send bytes, then MiBs of noise; return how many MiB were taken before the connection was closed."""
    noise = os.urandom(MIB)
    with suppress(OSError), socket.create_connection(address, timeout=2) as peer:
        peer.sendall(start)
        for taken in range(megabytes):
            try:
                peer.sendall(noise)
            except OSError:
                return taken
        return megabytes
    return 0


def garbage(address: tuple[str, int]) -> int:
    return send(address, os.urandom(64), 100)


def oversized_frame(address: tuple[str, int]) -> int:
    """A valid greeting, and then a command of 800 MiB where the handshake begins."""
    return send(address, ZMTP_GREETING + b"\x06" + struct.pack(">Q", 800 * MIB), 100)


def torch_store(address: tuple[str, int]) -> int:
    """A value of 800 MiB for torch's TCPStore."""
    return send(address, TORCH_VALIDATE + TORCH_SET, 100)


def http(address: tuple[str, int]) -> int:
    return send(address, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 838860800\r\n\r\n", 100)


ATTACKS: dict[str, Callable[[tuple[str, int]], int]] = {
    "garbage": garbage,
    "oversized frame": oversized_frame,
    "torch store": torch_store,
    "http": http,
}


def half_open(address: tuple[str, int], number: int) -> list[socket.socket]:
    """Return connections that send nothing."""
    return [socket.create_connection(address, timeout=2) for _ in range(number)]


def resident_bytes(pid: int | str = "self") -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
