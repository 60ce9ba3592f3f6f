"""Crash quarantine over simulated ranks: any crashing requests, in any order, with any arrivals."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch.engine.quarantine import CrashQuarantine
from lockstep.runtime.sampling_params import SamplingParams

LENGTH = 6


class FakeOutput:
    """Stands in for an Output, and for its request."""

    def __init__(self, number: int) -> None:
        self.num_tokens = 0
        self.finished = False
        self.params = SamplingParams(seed=number)
        self.request = self


class FakeGeneration:
    """Stands in for a Generation of one output."""

    def __init__(self, number: int, deadly_at: int | None) -> None:
        self.number, self.deadly_at = number, deadly_at
        self.prompt_ids = [number]
        self.outputs = [FakeOutput(number)]

    @property
    def finished(self) -> bool:
        return self.outputs[0].finished


def simulate(deadly: list[int | None], arrivals: list[int]) -> tuple[set[int], list[FakeGeneration]]:
    """Step until all generations have ended; return the numbers of the quarantined ones, and all of them.

    deadly    of each generation, after how many tokens the ranks crash in its step; None: never
    arrivals  the turn before which each generation comes
    """
    quarantine: Any = CrashQuarantine(60.0)
    generations = [FakeGeneration(number, at) for number, at in enumerate(deadly)]
    quarantined: set[int] = set()
    running: list[FakeGeneration] = []
    for turn in range(2000):
        for generation in generations:
            if arrivals[generation.number] == turn and not quarantine.hold(generation):
                running.append(generation)
        live = [g for g in generations if arrivals[g.number] <= turn and not g.finished]
        to_pause, to_resume = quarantine.advance()
        running = [g for g in running if g not in to_pause and not g.finished] + to_resume
        assert len(set(running)) == len(running)
        if any(g.outputs[0].num_tokens == g.deadly_at for g in running):
            cause = quarantine.on_crash(live)
            if cause is not None:
                cause[0].outputs[0].finished = True
                quarantined.add(cause[0].number)
            paused = quarantine.paused
            running = [g for g in live if g not in paused and not g.finished]
        else:
            for g in running:
                g.outputs[0].num_tokens += 1
                g.outputs[0].finished = g.outputs[0].num_tokens == LENGTH
        if all(g.finished for g in generations):
            return quarantined, generations
    raise AssertionError("it does not end")


@given(st.data())
def test_crashing_requests_end_and_no_others(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    numbers = st.one_of(st.none(), st.none(), st.integers(0, LENGTH - 1))
    deadly = data.draw(st.lists(numbers, min_size=size, max_size=size))
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    quarantined, generations = simulate(deadly, arrivals)
    assert quarantined == {g.number for g in generations if g.deadly_at is not None}
    assert all(g.outputs[0].num_tokens == (LENGTH if g.deadly_at is None else g.deadly_at) for g in generations)
