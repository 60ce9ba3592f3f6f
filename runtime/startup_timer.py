"""Durations of the phases of a start-up.

The time of a phase inside another counts for the inner one only, so the sum of all is at most the whole. The first
start of a command counts from the start of its process, so the whole is the time for which the user has waited.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)
READY = "ready"
MIN_SHOWN_S = 0.05  # shorter phases round to 0.0 s
_waiting_since: float | None = None  # time.perf_counter; the next StartupTimer counts from here


def count_from_process_start() -> None:
    """Let the next StartupTimer count from the start of this process; for commands."""
    global _waiting_since
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the boot, see proc(5)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    _waiting_since = time.perf_counter() - age


@contextmanager
def count_from_here() -> Iterator[None]:
    """Let a StartupTimer made in the block count from its beginning, unless it counts from the process's start."""
    global _waiting_since
    _waiting_since = _waiting_since or time.perf_counter()
    try:
        yield
    finally:
        _waiting_since = None


class StartupTimer:
    """A stopwatch for one start-up, running since it was made or longer: `with timer("weights"): ...`.

    The time before it was made is the phase "imports".
    """

    def __init__(self) -> None:
        global _waiting_since
        self.seconds: dict[str, float] = {}  # seconds of each phase, in the order in which the phases ended
        self._started = time.perf_counter()
        if _waiting_since is not None:
            self.seconds["imports"] = self._started - _waiting_since
            self._started, _waiting_since = _waiting_since, None

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


def log_ready(ranks: str, record: Mapping[str, float]) -> None:
    """Log the result of `StartupTimer.record` as `2 ranks ready in 4.8 s`, and its phases at the level debug."""
    log.info("%s ready in %.1f s", ranks, record[READY])
    shown = [f"{name} {seconds:.1f}" for name, seconds in record.items() if name != READY and seconds >= MIN_SHOWN_S]
    log.debug("of this, in seconds: %s", ", ".join(shown))
