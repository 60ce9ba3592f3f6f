"""The warnings of ranks on their way to the driver's log."""

from __future__ import annotations

import logging
from typing import Literal

import pytest
import ray

from lockstep.launch.cluster import worker
from lockstep.launch.cluster.rank_warnings import WarningCollector, log_rank_warnings
from lockstep.launch.cluster.worker import RankActor
from lockstep.runtime.config import Config


def test_warnings_of_the_package_are_collected_until_the_end() -> None:
    module = logging.getLogger("lockstep.comm.connect")
    collector = WarningCollector()
    module.warning("%s is not used", "push")
    module.info("connected")
    logging.getLogger("another.package").warning("not ours")
    assert collector.take() == ["push is not used"]
    module.error("a last word")
    collector.close()
    module.warning("too late")
    assert collector.take() == ["a last word"]
    assert collector.take() == []


def test_equal_warnings_are_logged_once_with_their_ranks(caplog: pytest.LogCaptureFixture) -> None:
    log_rank_warnings([["slow", "one"], ["slow", "other"], ["slow", "other", "slow"]])
    assert caplog.messages == ["ranks 0, 1, 2: slow", "rank 0: one", "ranks 1, 2: other"]


@pytest.mark.parametrize(("device", "chosen"), [("cuda", ""), ("cuda", "eth7"), ("cpu", "")])
def test_address_without_an_interface_is_a_warning_where_nccl_would_choose_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: Literal["cuda", "cpu"], chosen: str
) -> None:
    monkeypatch.setattr(worker, "interface_of", lambda ip: "")
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", chosen)
    if not chosen:
        monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    rank = RankActor(0, 1, Config(device=device), {"OMP_NUM_THREADS": "1"})
    assert rank.bind("127.0.0.1").interface == ""
    rank._inbox.close()
    rank._store.close()
    warned = "127.0.0.1 is not the first address of an interface: NCCL chooses one" in caplog.text
    assert warned == (device == "cuda" and not chosen)
