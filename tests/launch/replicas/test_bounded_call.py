"""Calls of Ray Serve with a deadline, with functions in their place."""

from __future__ import annotations

import threading
import time

import pytest

from lockstep.launch.errors import RankFailed, RayLost
from lockstep.launch.replicas import bounded_call as module
from lockstep.launch.replicas.bounded_call import bounded_call


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.02)


def check() -> None:
    """Find nothing wrong."""


def test_result_and_error_are_those_of_the_call() -> None:
    deadline = time.perf_counter() + 30
    assert bounded_call("status", lambda: 7, deadline, check) == 7
    with pytest.raises(ZeroDivisionError):
        bounded_call("status", lambda: 1 // 0, deadline, check)


def test_call_that_does_not_return_is_named_at_the_deadline() -> None:
    never = threading.Event()
    with pytest.raises(
        RankFailed, match=r"^start of the replicas: the controller of Ray Serve has not answered within"
    ):
        bounded_call("start of the replicas", never.wait, time.perf_counter() + 0.05, check)
    never.set()


def test_loss_of_ray_ends_the_wait() -> None:
    never = threading.Event()

    def lost() -> None:
        raise RayLost("the GCS is gone")

    with pytest.raises(RayLost, match="the GCS is gone"):
        bounded_call("status", never.wait, time.perf_counter() + 30, lost)
    never.set()
