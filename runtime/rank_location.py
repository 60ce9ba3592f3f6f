"""Where a rank runs, and what it holds in memory."""

from __future__ import annotations

import msgspec

from .limits import Limits
from .memory.memory_plan import MemoryPlan


class RankLocation(msgspec.Struct, frozen=True):
    """The host, process and memory of one rank."""

    rank: int
    host: str
    pid: int
    device: str = ""  # "GPU 0 (NVIDIA H200, 139.81 GiB)"
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    reduced_token_bytes: int = 0  # bytes of a token that the rank gives to all-reduces, over all layers

    def with_memory(self, plan: MemoryPlan, limits: Limits) -> RankLocation:
        """Return this location with the device and the memory of a rank that has loaded its weights."""
        kv_cache = plan.page_bytes * limits.num_pages
        return msgspec.structs.replace(
            self, device=plan.place, weight_bytes=plan.weights, kv_cache_bytes=kv_cache,
            reduced_token_bytes=plan.reduced_token_bytes,
        )  # fmt: skip
