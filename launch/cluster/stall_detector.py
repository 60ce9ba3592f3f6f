"""The detection of an engine that makes no steps although requests are live."""

from __future__ import annotations

import time


class StallDetector:
    """Compares the number of steps at each `update`; apart from this, the executor fails after --step-timeout."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._steps = -1
        self._progress_at = time.monotonic()  # time of the last update with a new step or without live requests

    def update(self, steps: int, num_live: int) -> None:
        if steps != self._steps or num_live == 0:
            self._steps, self._progress_at = steps, time.monotonic()

    def problem(self) -> str | None:
        """Return a description of the stall if live requests have waited for a step longer than the timeout."""
        silence_s = time.monotonic() - self._progress_at
        return None if silence_s < self._timeout_s else f"no step for {silence_s:.0f} s although requests are live"
