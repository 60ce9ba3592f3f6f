"""Durations of the phases of a start-up.

The time of a phase inside another counts for the inner one only, so the sum of all is at most the whole. Imports
before the timer was made are not included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

READY = "ready"
MIN_SHOWN_S = 0.05  # shorter phases round to 0.0 s


class StartupTimer:
    """A stopwatch for one start-up, running since it was made: `with timer("weights"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # seconds of each phase, in the order in which the phases ended
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to the phase `name`, less that of phases inside."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            elapsed = time.perf_counter() - started - inner
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def add_slowest(self, ranks: list[Mapping[str, float]]) -> None:
        """Add the phases of ranks that started in parallel, each with the slowest rank's time."""
        for name in dict.fromkeys(name for seconds in ranks for name in seconds):
            slowest = max(seconds.get(name, 0.0) for seconds in ranks)
            self.seconds[name] = self.seconds.get(name, 0.0) + slowest

    def record(self) -> dict[str, float]:
        """Return the seconds since the start, as "ready", and those of each phase, for JSON."""
        return {READY: time.perf_counter() - self._started, **self.seconds}


def summary(record: Mapping[str, float]) -> str:
    """Return the result of `record` as text: `ready in 4.8 s: weights 1.9, graphs 1.1`."""
    shown = [f"{name} {seconds:.1f}" for name, seconds in record.items() if name != READY and seconds >= MIN_SHOWN_S]
    return f"ready in {record[READY]:.1f} s" + (f": {', '.join(shown)}" if shown else "")
