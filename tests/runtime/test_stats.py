"""Arithmetic of the engine's counters."""

from __future__ import annotations

from lockstep.runtime.stats import EngineStats


def test_stats_add_and_subtract_every_counter() -> None:
    before, step = EngineStats(steps=3, output_tokens=7, wait_s=0.5), EngineStats(steps=1, preemptions=2, wait_s=0.25)
    after = before + step
    assert after == EngineStats(steps=4, output_tokens=7, preemptions=2, wait_s=0.75)
    assert after - before == step
    assert sum([before, step], EngineStats()) == after
