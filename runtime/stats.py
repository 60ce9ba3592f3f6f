"""What an engine tells of itself: counters that only grow, and a profile for who asks for one.

A measurement is the difference of two readings of the counters; whoever exports metrics can show them as they are.
"""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct):
    """What rank 0's engine has done since it started, step by step; a step counts when its tokens have come."""

    steps: int = 0
    decode_steps: int = 0  # steps of decoding requests only
    prompt_tokens: int = 0  # computed: not those found in the prefix cache, but again those of preempted requests
    output_tokens: int = 0
    decode_kv_tokens: int = 0  # tokens whose keys and values the decode steps read, sliding windows not considered
    preemptions: int = 0
    schedule_s: float = 0.0  # deciding on steps, and telling the followers
    launch_s: float = 0.0  # on a CPU, the computation
    wait_s: float = 0.0  # for sampled tokens
    commit_s: float = 0.0  # taking the tokens in
    decode_s: float = 0.0  # length of the decode steps: from the start, or the end of the step before if that is later

    def since(self, before: EngineStats) -> EngineStats:
        """What was added after the reading `before`."""
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(before), strict=True)
        return EngineStats(*(now - then for now, then in pairs))


class Profile(msgspec.Struct, frozen=True):
    """A trace of some decode steps on rank 0, and what they are to be held against."""

    num_steps: int
    trace: bytes  # a Chrome trace, JSON; empty if there were no decode steps
    device: str
    weight_bytes: int  # read by each decode step: all weights but an embedding that is read by rows (all experts, too)
    kv_token_bytes: int  # keys and values of one token, over all layers
    copy_bytes_per_s: float  # read and written by a large copy on this device
