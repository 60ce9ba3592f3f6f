"""Crash quarantine: find by trial the request that crashes the engine repeatedly, and refuse it for a while.

A crash is a failure of the ranks while requests are live. A step has no randomness, so a crash that a request causes
happens again at the same token. A request is a suspect if it was live in two crashes in a row and got no token in
between. Suspects are tested one at a time, the newest first, while all others are paused. A suspect that gets its next
token is cleared; if there is another crash, it is the cause. After other crashes, such as a killed process or a lost
node, requests do get their next token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import msgspec

from ...runtime.generation import Generation
from ...runtime.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestProgress:
    """The progress of a request at a crash of the engine."""

    lengths: list[int]  # number of tokens in each output
    num_crashes: int  # crashes in a row, without a token in between


@dataclass(frozen=True)
class QuarantinedRequest:
    """A request that crashed the engine: the same one is refused until a time of time.monotonic."""

    prompt_ids: list[int]
    params: SamplingParams
    until: float


class CrashQuarantine:
    """The generations that must not run now, and the requests that crashed the engine within `window_s` seconds."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._progress: WeakKeyDictionary[Generation, RequestProgress] = WeakKeyDictionary()
        self.suspects: list[Generation] = []  # not tested yet, the oldest first
        self._tested: Generation | None = None
        self._held: list[Generation] = []  # others, paused until all suspects have been tested
        self._quarantined: list[QuarantinedRequest] = []

    @property
    def paused(self) -> list[Generation]:
        """All generations that must not run now."""
        return [*self.suspects, *self._held]

    def on_crash(self, live: Iterable[Generation]) -> tuple[Generation, int] | None:
        """Note a crash with these live; return the generation that caused it and its crashes, once that is known."""
        paused = self.paused
        running = [generation for generation in live if generation not in paused]
        num_crashes = {generation: self._num_crashes(generation) + 1 for generation in running}
        tested, self._tested = self._tested, None
        if tested in running and num_crashes[tested] > 2:
            self._quarantine(tested)
            return tested, num_crashes[tested]
        lengths = {g: [output.num_tokens for output in g.outputs] for g in running}
        self._progress.update({g: RequestProgress(lengths[g], num_crashes[g]) for g in running})
        self.suspects += [g for g in running if num_crashes[g] > 1]
        self.suspects.sort(key=lambda generation: generation.number)
        if self.suspects:
            self._held += [g for g in running if num_crashes[g] == 1]
        return None

    def hold(self, generation: Generation) -> bool:
        """Pause a new generation if suspects are being tested; return whether it is paused."""
        if not self.suspects and self._tested is None:
            return False
        self._held.append(generation)
        return True

    def advance(self) -> tuple[list[Generation], list[Generation]]:
        """Test the next suspect once the last one is cleared; return the generations to pause and to resume."""
        tested, cleared = self._tested, list[Generation]()
        if tested is not None:
            if not tested.finished and self._num_crashes(tested):
                return [], []
            cleared = [] if tested.finished else [tested]
            self._tested = None
        while self.suspects and self._tested is None:
            newest = self.suspects.pop()
            self._tested = None if newest.finished else newest
        if self._tested is not None:
            self._held += cleared
            return cleared, [self._tested]
        held, self._held = self._held, []
        return [], [generation for generation in held if not generation.finished]

    def refuses(self, generation: Generation) -> bool:
        """Return whether the same request crashed the engine recently; clients retry automatically."""
        now, ids = time.monotonic(), generation.prompt_ids
        recent = (entry for entry in self._quarantined if entry.until > now)
        return any(entry.prompt_ids == ids and entry.params == _params(generation) for entry in recent)

    def _quarantine(self, generation: Generation) -> None:
        self._progress.clear()
        self.suspects.clear()
        self._held.clear()
        now = time.monotonic()
        self._quarantined = [entry for entry in self._quarantined if entry.until > now]
        self._quarantined.append(QuarantinedRequest(generation.prompt_ids, _params(generation), now + self._window_s))

    def _num_crashes(self, generation: Generation) -> int:
        """Return the crashes in a row with it live, during which one of its outputs got no token."""
        progress = self._progress.get(generation)
        if progress is None:
            return 0
        pairs = zip(generation.outputs, progress.lengths, strict=True)
        is_stuck = any(output.num_tokens == length for output, length in pairs if not output.finished)
        return progress.num_crashes if is_stuck else 0


def _params(generation: Generation) -> SamplingParams:
    """Return its sampling parameters without the seed, which may be a random one."""
    return msgspec.structs.replace(generation.outputs[0].request.params, seed=None)
