"""The start of Ray ahead of its use: which commands begin one, who takes it over, and when it ends unused."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from lockstep.launch.cluster import ray_starter
from lockstep.launch.cluster.rank_resources import local_cpus
from lockstep.launch.cluster.ray_starter import start_ray_ahead
from lockstep.runtime.config import Config

TWO = Config(tensor_parallel_size=2, device="cpu")


class FakeStarter:
    """A stand-in for RayStarter, which starts nothing."""

    def __init__(self, num_cpus: int) -> None:
        self.num_cpus, self.num_closed = num_cpus, 0

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace RayStarter; other tests of this process may have connected to Ray."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_starter, "RayStarter", FakeStarter)


def test_start_is_taken_over_and_not_closed_by_the_block() -> None:
    with start_ray_ahead(TWO):
        [started] = ray_starter._ahead
        taken = ray_starter.ray_starter(local_cpus(TWO))
        assert taken is started
        assert ray_starter.ray_starter(local_cpus(TWO)) is not started
    assert taken.num_closed == 0


def test_start_that_nobody_takes_ends_with_the_outermost_block() -> None:
    def fail() -> None:
        with start_ray_ahead(TWO), start_ray_ahead(TWO):
            [started] = ray_starter._ahead
            unused.append(started)
            raise ValueError("a bad model")

    unused: list[FakeStarter] = []
    with pytest.raises(ValueError, match="a bad model"):
        fail()
    assert unused[0].num_closed == 1
    assert not ray_starter._ahead


def test_start_for_another_number_of_cpus_is_not_taken() -> None:
    with start_ray_ahead(TWO):
        [started] = ray_starter._ahead
        assert ray_starter.ray_starter(started.num_cpus + 1) is not started
    assert started.num_closed == 1


@pytest.mark.parametrize(
    ("config", "replicas", "starts"),
    [
        (Config(device="cpu"), 1, False),
        (Config(device="cpu"), 2, True),
        (TWO, 1, True),
        (Config(tensor_parallel_size=2, ray_address="10.0.0.1:6379"), 1, False),
        (Config(tensor_parallel_size=2, ray_address="auto"), 2, False),
    ],
)
def test_only_ranks_on_a_local_cluster_start_it(config: Config, replicas: int, starts: bool) -> None:
    with start_ray_ahead(config, replicas):
        assert bool(ray_starter._ahead) == starts


def test_user_who_has_connected_to_ray_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    with start_ray_ahead(TWO):
        assert not ray_starter._ahead


def test_local_cluster_has_a_cpu_for_each_rank() -> None:
    config = Config(tensor_parallel_size=(os.cpu_count() or 1) + 1)
    assert local_cpus(config) == config.tensor_parallel_size
    assert local_cpus(config, 3) == 3 * config.tensor_parallel_size
