"""The engine's state as others read it; a module without torch, for processes that only answer HTTP requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

from ...runtime.rank_location import RankLocation
from ...runtime.stats import EngineDistributions, EngineStats


@dataclass(frozen=True)
class Health:
    """The engine's state and, unless it is ready, the reason."""

    state: Literal["ready", "recovering", "draining", "failed"]
    reason: str = ""
    since: float = field(default_factory=time.time)
    restarts: int = 0  # number of times that the ranks were started again


class EngineEvent(NamedTuple):
    """A failure or a recovery, for people to read."""

    at: float  # time.time()
    event: str


class AsyncEngineStats(msgspec.Struct, frozen=True):
    """A reading of the engine's state, as seen from the front end."""

    num_live: int  # outputs that have not ended
    running: int  # live outputs that the ranks have started
    waiting: int
    kv_usage: float  # 0 to 1: pages of the running outputs; shared pages count for each output
    free_pages: int  # free pages of the KV cache after the scheduler's last step
    prefix_hits: int  # tokens found in the prefix cache; only grows
    prefix_queries: int  # tokens looked up in the prefix cache; only grows
    engine: EngineStats  # counters since the start, including those before a restart
    distributions: EngineDistributions
    restarts: int
    ranks: Sequence[RankLocation]  # the last ones, if the ranks have failed
    events: list[EngineEvent]
