"""The Ray cluster of this process, and the environment without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from processes import MARK, kill_marked, marked, new_mark
from waiting import left_after

CPUS = 4


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of CPUS cores to which this process is connected: the mark of its processes.

    Other Ray clusters may run on the same machine. Servers and workers of this one inherit the mark.
    """
    mark = new_mark()
    os.environ.update(mark)
    try:
        ray.init(
            address="local",
            num_cpus=CPUS,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            logging_level="ERROR",
            log_to_driver=False,
            _system_config={"worker_niceness": 0},  # at Ray's 15, other processes leave the ranks no core
        )
    finally:
        del os.environ[MARK]  # other processes that tests start are not Ray's
    yield mark
    ray.shutdown()
    left = left_after(lambda: marked(mark))
    kill_marked(mark)
    assert not left


@pytest.fixture
def ray_address(ray_cluster: dict[str, str]) -> str:
    """The address at which commands join the cluster."""
    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the cluster that this process may be connected to, and the one that the environment may name."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
