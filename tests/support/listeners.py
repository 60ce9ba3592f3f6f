"""The listening sockets of a group of processes, from /proc."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

LISTEN = "0A"  # the kernel's tcp_states.h


@dataclass(frozen=True)
class Listener:
    """A TCP port that a process listens on; `address` is an IPv4 address where IPv6 only wraps one."""

    pid: int
    title: str
    address: IPv4Address | IPv6Address
    port: int

    @property
    def place(self) -> tuple[str, int]:
        return str(self.address), self.port


def listeners(processes: dict[int, str]) -> list[Listener]:
    """Return the ports of these processes; `processes` has the command line of each pid."""
    found = []
    for pid, title in processes.items():
        inodes = set(_socket_inodes(pid))
        for table in ("tcp", "tcp6"):
            with suppress(OSError):  # ended meanwhile
                rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
                for row in (row.split() for row in rows):
                    if row[3] == LISTEN and row[9] in inodes:
                        address, _, port = row[1].partition(":")
                        found.append(Listener(pid, title, _address(address), int(port, 16)))
    return found


def urls_of(pid: int) -> list[str]:
    """Return the URLs of the ports on which a server listens."""
    return [f"http://127.0.0.1:{listener.port}" for listener in listeners({pid: ""})]


def free_port() -> int:
    """Return a free port that the kernel gives nobody who asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)  # below them: ports of Ray's workers; above: those of the kernel
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _socket_inodes(pid: int) -> Iterable[str]:
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
                if target.startswith("socket:["):
                    yield target[len("socket:[") : -1]


def _address(text: str) -> IPv4Address | IPv6Address:
    """Decode the kernel's hexadecimal words, each in the byte order of the machine."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    packed = b"".join(struct.pack("=I", word) for word in words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    address = ip_address(socket.inet_ntop(family, packed))
    return getattr(address, "ipv4_mapped", None) or address
