"""StallDetector against a clock of the test."""

from __future__ import annotations

import pytest

from lockstep.launch.cluster import stall_detector
from lockstep.launch.cluster.stall_detector import StallDetector


def test_only_live_requests_without_a_step_are_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stall_detector.time, "monotonic", lambda: now[0])
    detector = StallDetector(timeout_s=30.0)
    for seconds, steps, num_live, problem in [
        (0.0, 0, 0, None),
        (90.0, 0, 0, None),  # idle
        (29.0, 0, 1, None),
        (1.5, 0, 1, "no step for 30 s although requests are live"),
        (0.0, 1, 1, None),  # a step
        (31.0, 2, 1, None),
        (31.0, 2, 1, "no step for 31 s although requests are live"),
        (0.0, 2, 0, None),
    ]:
        now[0] += seconds
        detector.update(steps, num_live)
        assert detector.problem() == problem
