"""The interfaces of this machine by address."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.launch.cluster import network
from lockstep.launch.cluster.network import interface_of, is_own, own_addresses

IF_INET6 = """\
00000000000000000000000000000001 01 80 10 80       lo
fd00000000000000000000000000000a 02 40 00 80     eth0
fe800000000000000042acfffe110002 02 40 20 80     eth0
"""


def test_loopback_is_found_by_its_address() -> None:
    assert own_addresses()["lo"] == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == "", "an address of no machine (RFC 5737)"
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.1")


def test_ipv6_interface_is_found_by_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "IF_INET6", tmp_path / "if_inet6")
    assert interface_of("::1") == "", "IPv6 is off"
    network.IF_INET6.write_text(IF_INET6)
    assert interface_of("::1") == "lo"
    assert interface_of("fd00::a") == interface_of("fd00:0:0::000A") == "eth0"
    assert interface_of("fe80::42:acff:fe11:2%eth0") == "eth0"
    assert interface_of("fd00::b") == ""
