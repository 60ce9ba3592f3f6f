"""The network interfaces of this machine, and which one has the address by which the cluster knows it."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h


def own_addresses() -> dict[str, str]:
    """The first IPv4 address of each interface that has one."""
    return {name: address for _, name in socket.if_nameindex() if (address := _address(name))}


def interface_of(ip: str) -> str:
    """The interface that has this address; empty where it is an interface's second one, or IPv6."""
    return next((name for name, address in own_addresses().items() if address == ip), "")


def is_own(ip: str) -> bool:
    """Whether a socket can be bound to this address."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as trial:
        try:
            trial.bind((ip, 0))
        except OSError:
            return False
    return True


def _address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])
