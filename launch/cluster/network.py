"""The network interfaces of this machine, and which one has the address by which the cluster knows it.

psutil comes with Ray, but can only be imported after it; the doctor uses this module without Ray.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # linux/sockios.h
IF_INET6 = Path("/proc/net/if_inet6")  # lines of: address in hexadecimal, index, prefix, scope, flags, interface


def own_addresses() -> dict[str, str]:
    """Return the first IPv4 address of each interface that has one."""
    return {name: address for _, name in socket.if_nameindex() if (address := _ipv4_address(name))}


def interface_of(ip: str) -> str:
    """Return the interface that has this address; "" if none has, or if it is an interface's second IPv4 address."""
    if ":" in ip:
        return _ipv6_addresses().get(ipaddress.IPv6Address(ip.partition("%")[0]), "")
    return next((name for name, address in own_addresses().items() if address == ip), "")


def is_own(ip: str) -> bool:
    """Return whether a socket can be bound to this address."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as trial:
        try:
            trial.bind((ip, 0))
        except OSError:
            return False
    return True


def _ipv4_address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            reply = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(reply[20:24])


def _ipv6_addresses() -> dict[ipaddress.IPv6Address, str]:
    if not IF_INET6.exists():  # IPv6 is off
        return {}
    rows = [line.split() for line in IF_INET6.read_text().splitlines()]
    return {ipaddress.IPv6Address(bytes.fromhex(row[0])): row[5] for row in rows}
