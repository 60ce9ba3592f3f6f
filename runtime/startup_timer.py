"""How long the parts of a start take.

A phase inside another counts once, for itself: the times add up to no more than the whole. What Python had imported
before the recorder was made is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

READY = "ready"
SHOWN_S = 0.05  # a phase that rounds to 0.0 s is not worth a word


class StartupTimer:
    """A stopwatch for one start, running from the moment it is made: `with phases("weights"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # of each phase, in the order in which they ended
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase `name`, less that of the phases within."""
        started, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - before
            elapsed = time.perf_counter() - started - within
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def take_in(self, ranks: list[Mapping[str, float]]) -> None:
        """Add the phases of ranks that worked at the same time: of each phase, the slowest rank's time."""
        for name in dict.fromkeys(name for seconds in ranks for name in seconds):
            slowest = max(seconds.get(name, 0.0) for seconds in ranks)
            self.seconds[name] = self.seconds.get(name, 0.0) + slowest

    def record(self) -> dict[str, float]:
        """Seconds from the start to now, as "ready", and of each phase: what a benchmark writes down as JSON."""
        return {READY: time.perf_counter() - self._started, **self.seconds}


def summary(record: Mapping[str, float]) -> str:
    """`ready in 4.8 s: weights 1.9, graphs 1.1`, of what `record` returned."""
    shown = [f"{name} {seconds:.1f}" for name, seconds in record.items() if name != READY and seconds >= SHOWN_S]
    return f"ready in {record[READY]:.1f} s" + (f": {', '.join(shown)}" if shown else "")
