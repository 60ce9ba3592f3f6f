"""Finding the request that ends its ranks, against ranks that are played: any deadly ones, any order, any arrivals."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch.engine.quarantine import CrashQuarantine
from lockstep.runtime.request import SamplingParams

LENGTH = 6


class Output:
    """Stands for a Stream."""

    def __init__(self, number: int) -> None:
        self.token_ids: list[int] = []
        self.output = self
        self.finished = False
        self.params = SamplingParams(seed=number)
        self.request = self


class Asked:
    """Stands for a Generation of one output."""

    def __init__(self, number: int, deadly_at: int | None) -> None:
        self.number, self.deadly_at = number, deadly_at
        self.prompt_ids = [number]
        self.sequences = [Output(number)]

    @property
    def finished(self) -> bool:
        return self.sequences[0].finished


def play(deadly: list[int | None], arrivals: list[int]) -> tuple[set[int], list[Asked]]:
    """Steps until all have ended: numbers of those that were found guilty, and all of them.

    deadly    of each request, after how many tokens the ranks die in its step; None: never
    arrivals  before which turn each request comes
    """
    suspects: Any = CrashQuarantine(60.0)
    everyone = [Asked(number, at) for number, at in enumerate(deadly)]
    guilty: set[int] = set()
    running: list[Asked] = []
    for turn in range(2000):
        for asked in everyone:
            if arrivals[asked.number] == turn and not suspects.hold(asked):
                running.append(asked)
        live = [a for a in everyone if arrivals[a.number] <= turn and not a.finished]
        rest, go_on = suspects.step()
        running = [a for a in running if a not in rest and not a.finished] + go_on
        assert len(set(running)) == len(running)
        if any(len(a.sequences[0].token_ids) == a.deadly_at for a in running):
            found = suspects.died(live)
            if found is not None:
                found[0].sequences[0].finished = True
                guilty.add(found[0].number)
            resting = suspects.resting
            running = [a for a in live if a not in resting and not a.finished]
        else:
            for a in running:
                a.sequences[0].token_ids.append(0)
                a.sequences[0].finished = len(a.sequences[0].token_ids) == LENGTH
        if all(a.finished for a in everyone):
            return guilty, everyone
    raise AssertionError("it does not end")


@given(st.data())
def test_the_guilty_end_and_nobody_else(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    numbers = st.one_of(st.none(), st.none(), st.integers(0, LENGTH - 1))
    deadly = data.draw(st.lists(numbers, min_size=size, max_size=size))
    arrivals = data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size))
    guilty, everyone = play(deadly, arrivals)
    assert guilty == {a.number for a in everyone if a.deadly_at is not None}
    assert all(len(a.sequences[0].token_ids) == (LENGTH if a.deadly_at is None else a.deadly_at) for a in everyone)
