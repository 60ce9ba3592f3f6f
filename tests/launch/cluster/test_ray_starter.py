"""The start of Ray ahead of its use: which commands begin one, who takes it over, and when it ends unused."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from lockstep.launch.cluster import ray_starter
from lockstep.launch.cluster.rank_resources import LocalCluster, local_cluster
from lockstep.launch.cluster.ray_starter import start_ray_ahead
from lockstep.runtime.config import Config

TWO = Config(tensor_parallel_size=2, device="cpu")


class FakeStarter:
    """A stand-in for RayStarter, which starts nothing."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster, self.num_closed = cluster, 0

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
        taken = ray_starter.ray_starter(local_cluster(TWO))
        assert taken is started
        assert ray_starter.ray_starter(local_cluster(TWO)) is not started
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


def test_start_of_another_cluster_is_not_taken() -> None:
    with start_ray_ahead(TWO):
        [started] = ray_starter._ahead
        assert ray_starter.ray_starter(local_cluster(TWO, 2)) is not started
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


def test_ranks_of_one_group_take_all_cpus_of_a_local_cluster() -> None:
    assert local_cluster(TWO) == LocalCluster(2, starts_workers=True)


def test_several_groups_have_a_cpu_for_each_rank_and_those_of_the_machine() -> None:
    cpus = os.cpu_count() or 1
    assert local_cluster(Config(tensor_parallel_size=cpus + 1), 3) == LocalCluster(3 * cpus + 3, starts_workers=False)
    assert local_cluster(Config(), 2) == LocalCluster(max(2, cpus), starts_workers=False)
