"""Counters of an engine, which only grow, so that differences are measurements; and its profile."""

from __future__ import annotations

from bisect import bisect_left
from operator import add, sub

import msgspec

TOKENS_PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PHASE_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class Distribution(msgspec.Struct):
    """Counts of values by bucket: bucket i ends at bounds[i], included, and the last one has no end."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value; only one thread may do this."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def __add__(self, other: Distribution) -> Distribution:
        return Distribution(self.bounds, list(map(add, self.counts, other.counts)), self.total + other.total)


def distribution(bounds: tuple[float, ...]) -> Distribution:
    """Return the default of a field; prometheus_client's histograms take ten times as long for each value."""
    return msgspec.field(default_factory=lambda: Distribution(bounds))


class EngineDistributions(msgspec.Struct):
    """Distributions over all steps and outputs since the front end started; restarts of the ranks do not reset them."""

    step_tokens: Distribution = distribution(TOKENS_PER_STEP)
    queue_s: Distribution = distribution(PHASE_S)  # until admitted
    prefill_s: Distribution = distribution(PHASE_S)  # until the first token


class EngineStats(msgspec.Struct):
    """Counters of rank 0's engine since it started. A step counts once its tokens are on the host."""

    steps: int = 0
    decode_steps: int = 0  # steps of decoding requests only
    prompt_tokens: int = 0  # prompt tokens computed: no prefix cache hits; those of preempted requests count again
    output_tokens: int = 0
    decode_kv_tokens: int = 0  # tokens of keys and values read by decode steps, regardless of sliding windows
    preemptions: int = 0
    schedule_s: float = 0.0  # schedule steps and publish their plans
    launch_s: float = 0.0  # launch steps; on a CPU, compute them
    wait_s: float = 0.0  # wait for sampled tokens
    commit_s: float = 0.0  # commit the tokens
    attention_s: float = 0.0  # part of launch_s: attention on a CPU
    collective_s: float = 0.0  # part of launch_s: collectives that the host takes part in
    decode_s: float = 0.0  # length of the decode steps: from the start, or the end of the step before if that is later

    def __add__(self, other: EngineStats) -> EngineStats:
        return EngineStats(*map(add, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))

    def __sub__(self, other: EngineStats) -> EngineStats:
        return EngineStats(*map(sub, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))


class Profile(msgspec.Struct, frozen=True):
    """A trace of some decode steps on rank 0, and the figures to compare it with."""

    num_steps: int
    trace: bytes  # a Chrome trace, JSON; empty if there were no decode steps
    device: str
    weight_bytes: int  # bytes that each decode step reads: all weights, all experts too, less an embedding read by rows
    kv_token_bytes: int  # bytes of the keys and values of one token, over all layers
    copy_bytes_per_s: float  # bytes read and written per second by a large copy on this device
