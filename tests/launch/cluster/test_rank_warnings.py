"""The warnings of ranks on their way to the driver's log."""

from __future__ import annotations

import logging

import pytest

from lockstep.launch.cluster.rank_warnings import WarningCollector, log_rank_warnings


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
