"""The limit of open files before Ray starts: raised where that is possible, and named where it is not."""

from __future__ import annotations

import resource
import threading

import pytest

from lockstep.comm.message_sockets import WakeupEvent
from lockstep.launch.cluster.local_ray import LocalRay
from lockstep.launch.cluster.rank_resources import LocalCluster
from lockstep.launch.cluster.remote_ray import RemoteRay
from lockstep.launch.errors import PlacementError
from lockstep.launch.open_files import MIN_FILES, require_open_files


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit, which the code under test may change."""
    limits = [1024, 1024]

    def setrlimit(kind: int, values: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        assert values[1] == limits[1]
        limits[:] = values

    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    return limits


def test_soft_limit_is_raised_if_it_is_too_low(limits: list[int]) -> None:
    limits[:] = [64, 4096]
    require_open_files()
    assert limits == [4096, 4096]
    limits[:] = [MIN_FILES, 4096]
    require_open_files()
    assert limits == [MIN_FILES, 4096], "a program of the user may have chosen it"
    limits[:] = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    require_open_files()


def test_hard_limit_that_is_too_low_is_named_before_ray_starts(limits: list[int]) -> None:
    limits[:] = [40, 64]
    rule = rf"^the limit of open files is 64, and Ray needs {MIN_FILES}; as root ulimit -n {MIN_FILES}, docker run "
    with pytest.raises(PlacementError, match=rule):
        LocalRay(LocalCluster(2, starts_workers=False), threading.Event(), WakeupEvent())
    with pytest.raises(PlacementError, match=rule):
        RemoteRay("10.0.0.1:6379", WakeupEvent())
