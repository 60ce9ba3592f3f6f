"""Which request ends its ranks every time, found by trying, so that it does not take the others with it.

A death that a request causes comes again at the same token: nothing random enters a step. So whoever was live in two
deaths in a row and has come no further in between is a suspect. Suspects go on one at a time, the newest first, while
all others rest: one that gets its next token is cleared, and one under which the ranks die again is guilty. Deaths of
another origin, a killed process or a lost node, fall on requests that do come further.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import msgspec

from ...runtime.frontend import Generation
from ...runtime.request import SamplingParams


@dataclass(frozen=True)
class Progress:
    """Where a request was when the ranks died."""

    lengths: list[int]  # of its outputs, in tokens
    deaths: int  # in a row, without a token in between


@dataclass(frozen=True)
class Quarantined:
    """A request that is not tried again, and its repetitions until a time of time.monotonic."""

    prompt_ids: list[int]
    params: SamplingParams
    until: float


class CrashQuarantine:
    """Told of every death and asked who may go on; `window_s` is how long a guilty request is remembered."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._marks: WeakKeyDictionary[Generation, Progress] = WeakKeyDictionary()
        self._waiting: list[Generation] = []  # suspects in the order in which they came
        self._tried: Generation | None = None
        self._held: list[Generation] = []  # who goes on when all have been tried
        self._guilty: list[Quarantined] = []

    def died(self, live: Iterable[Generation]) -> tuple[Generation, int] | None:
        """Ranks have died with these live: the one that has caused it and its deaths, if that is known now."""
        resting = self.resting
        exposed = [g for g in live if g not in resting]
        deaths = {g: self._deaths(g) + 1 for g in exposed}
        tried, self._tried = self._tried, None
        if tried in exposed and deaths[tried] > 2:
            self._marks.clear()
            self._waiting.clear()
            self._held.clear()
            now = time.monotonic()
            self._guilty = [g for g in self._guilty if g.until > now]
            self._guilty.append(Quarantined(tried.prompt_ids, _params(tried), now + self._window_s))
            return tried, deaths[tried]
        self._marks.update({g: Progress(_lengths(g), deaths[g]) for g in exposed})
        self._waiting += [g for g in exposed if deaths[g] > 1]
        self._waiting.sort(key=lambda g: g.number)
        if self._waiting:
            self._held += [g for g in exposed if deaths[g] == 1]
        return None

    @property
    def waiting(self) -> list[Generation]:
        """The suspects that have yet to be tried."""
        return list(self._waiting)

    @property
    def resting(self) -> list[Generation]:
        """All that must not go on yet."""
        return [*self._waiting, *self._held]

    def hold(self, generation: Generation) -> bool:
        """Whether a new request has to rest, too, because one is tried."""
        if not self._waiting and self._tried is None:
            return False
        self._held.append(generation)
        return True

    def step(self) -> tuple[list[Generation], list[Generation]]:
        """Who rests from now on, and who goes on."""
        tried, cleared = self._tried, list[Generation]()
        if tried is not None:
            if not tried.finished and self._deaths(tried):
                return [], []
            cleared = [] if tried.finished else [tried]
            self._tried = None
        while self._waiting and self._tried is None:
            newest = self._waiting.pop()
            self._tried = None if newest.finished else newest
        if self._tried is not None:
            self._held += cleared
            return cleared, [self._tried]
        held, self._held = self._held, []
        return [], [g for g in held if not g.finished]

    def knows(self, generation: Generation) -> bool:
        """Whether this is a guilty request once more: clients try again by themselves."""
        now = time.monotonic()
        asked = (generation.prompt_ids, _params(generation))
        return any(g.until > now and (g.prompt_ids, g.params) == asked for g in self._guilty)

    def _deaths(self, generation: Generation) -> int:
        """How often the ranks have died in a row with it live and one of its outputs no further than it is."""
        mark = self._marks.get(generation)
        if mark is None:
            return 0
        pairs = zip(generation.sequences, mark.lengths, strict=True)
        stuck = any(len(s.output.token_ids) == length for s, length in pairs if not s.finished)
        return mark.deaths if stuck else 0


def _lengths(generation: Generation) -> list[int]:
    return [len(stream.output.token_ids) for stream in generation.sequences]


def _params(generation: Generation) -> SamplingParams:
    """Its sampling parameters, without the seed: one may have been drawn for it."""
    return msgspec.structs.replace(generation.sequences[0].request.params, seed=None)
