"""The address of the Ray cluster: which spellings there are, and which belong to other services."""

from __future__ import annotations

import pytest

from lockstep.launch.cluster.ray_address import ray_address, uses_local_ray
from lockstep.runtime.config import Config


@pytest.mark.parametrize("address", ["auto", "local", "head:6379", "10.0.0.1:6379", "[fe80::1]:6379", "a-b.c:1"])
@pytest.mark.parametrize("by_variable", [False, True])
def test_addresses_of_a_cluster(address: str, by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address if by_variable else "other:1")
    config = Config(ray_address=None if by_variable else address)
    assert ray_address(config) == address
    assert uses_local_ray(config) == (address == "local")


@pytest.mark.parametrize("value", [None, "", " "])
def test_empty_variable_is_unset(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert ray_address(Config()) == ray_address(Config(ray_address="")) == "local"
    assert uses_local_ray(Config())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://head:8265", "web page or of Ray's jobs"),
        ("HTTPS://head:8265", "web page or of Ray's jobs"),
        ("ray://head:10001", "Ray Client"),
        ("redis://head:6379", "no address of Ray"),
        ("head", "no address of Ray"),
        ("head:", "no address of Ray"),
        ("head:port", "no address of Ray"),
        ("::1:6379", "no address of Ray"),
        (":6379", "no address of Ray"),
    ],
)
def test_other_services_are_refused(address: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    for name, config in (("RAY_ADDRESS", Config()), ("ray_address", Config(ray_address=address))):
        with pytest.raises(ValueError, match=reason) as caught:
            ray_address(config)
        assert str(caught.value).startswith(f"{name}={address!r} ")
        assert "HOST:PORT" in str(caught.value)
        assert "\n" not in str(caught.value)
