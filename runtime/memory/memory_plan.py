"""Where the memory of one rank goes, and the reason where something does not fit.

A MemoryPlan is plain numbers and everything is computed from them, without torch; gpu.py looks at a GPU.
The KV cache gets what the rest leaves of the share of the GPU that the rank may use:

    |-- at start --|-- weights --|-- graphs --|-- workspaces --|------ room: KV cache ------|-- free --|
    0                                                                                    allowed     total
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..config import Config
from ..model.model_config import DTYPES, ModelConfig
from .parameter_count import kv_of_token, weights_of_rank

log = logging.getLogger(__name__)
GIB = 2**30
CPU_KV_CACHE_GIB = 1.0  # unless kv_cache_memory says otherwise: a host's memory is not ours to fill
OWN_CONTEXT = 768 * 2**20  # a CUDA context takes some 500 MiB: more than this at start, and somebody else is there
MIN_TOKENS = 2  # of KV cache, for any request: one of its prompt, one of its output


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One rank's memory, in bytes; all but weights and KV cache is known on a GPU only."""

    place: str  # "GPU 0 (NVIDIA H200, 139.81 GiB)"
    weights: int
    page_bytes: int
    page_size: int  # tokens
    num_pages: int = 0
    total: int | None = None  # None: a host, whose memory is not measured
    utilization: float = 1.0
    gpus_per_rank: float = 1.0
    at_start: int = 0  # in use before this rank took anything: by other processes, by the CUDA context
    graphs: int = 0
    num_graphs: int = 0
    graph_rows: int = 0  # of the largest graph
    workspaces: int = 0  # activations of the largest step, workspaces, tables, kernels, libraries
    neighbours: str = ""  # the end of an error: who else is on the GPU

    @property
    def kv_cache(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def tokens(self) -> int:
        """What the KV cache holds."""
        return self.num_pages * self.page_size

    @property
    def token_bytes(self) -> int:
        return self.page_bytes // self.page_size

    @property
    def taken(self) -> int:
        """Everything but the KV cache."""
        return self.at_start + self.weights + self.graphs + self.workspaces

    @property
    def allowed(self) -> int | None:
        """The share of the GPU that may be used, what is in use at start included."""
        return None if self.total is None else round(self.total * self.utilization * self.gpus_per_rank)

    @property
    def room(self) -> int | None:
        """The most that the KV cache may take; below zero where the rest is too much already."""
        return None if self.allowed is None else self.allowed - self.taken

    @property
    def free(self) -> int | None:
        """What stays free of the whole GPU."""
        return None if self.total is None else self.total - self.taken - self.kv_cache

    def longest_context(self, max_model_len: int) -> int:
        """The longest prompt plus output of one request, in tokens."""
        return min(max_model_len, self.tokens)

    def least_utilization(self, kv_bytes: int) -> float:
        """The least gpu_memory_utilization, in hundredths, that leaves this much room; above 1 where none does."""
        assert self.total is not None
        return math.ceil(100 * (self.taken + kv_bytes) / (self.total * self.gpus_per_rank)) / 100

    def with_pages(self, config: Config) -> MemoryPlan:
        """With the pages that `config`, which is resolved, asks for, or else as many as there is room for."""
        return replace(self, num_pages=self._num_pages(config))

    def table(self, max_model_len: int) -> str:
        """All parts, one in a line."""
        context = self.longest_context(max_model_len)
        contexts = f"{self.tokens / context:,.1f} contexts of {context:,}"
        tokens = f"{self.tokens:,} tokens of {size(self.token_bytes)}: {contexts}"
        graphs = f"{self.num_graphs} captured, up to {self.graph_rows} rows"
        others = self.neighbours.removeprefix("; ") if self.at_start > OWN_CONTEXT else "CUDA context, communication"
        rows = (
            ("in use at start", self.at_start or None, others),
            ("weights", self.weights, ""),
            ("CUDA graphs", self.graphs if self.num_graphs else None, graphs),
            ("workspaces", self.workspaces or None, "activations, tables, kernels, libraries"),
            ("KV cache", self.kv_cache, tokens),
            ("free" if self.gpus_per_rank == 1 else "left to others", self.free, ""),
        )
        lines = [f"  {name:<15} {size(n):>10}   {note}".rstrip() for name, n, note in rows if n is not None]
        share = "" if self.total is None else f", {self.share_text}"
        return "\n".join([f"memory of {self.place}{share}", *lines])

    @property
    def share_text(self) -> str:
        """The flags that say how much may be used."""
        shared = "" if self.gpus_per_rank == 1 else f" with gpus_per_rank={self.gpus_per_rank:g}"
        return f"gpu_memory_utilization={self.utilization:g}{shared}"

    def _num_pages(self, config: Config) -> int:
        if config.num_pages is not None:
            return config.num_pages
        if config.kv_cache_memory is not None:
            return int(config.kv_cache_memory * GIB) // self.page_bytes
        if self.room is not None:
            return max(0, self.room) // self.page_bytes
        assert config.max_model_len is not None
        pages_per_seq = -(-config.max_model_len // self.page_size)
        wanted = config.max_num_seqs * pages_per_seq
        return min(wanted, max(int(CPU_KV_CACHE_GIB * GIB) // self.page_bytes, pages_per_seq))


def plan_weights(config: Config, model: ModelConfig) -> MemoryPlan:
    """The plan of a rank on a CPU that has loaded nothing yet: its weights and its pages; `config` is resolved.

    Raises ValueError where the model cannot be split over the ranks.
    """
    ranks, number_bytes = config.tensor_parallel_size, DTYPES[config.dtype]
    model.check_tensor_parallel(ranks)
    return MemoryPlan(
        place="the CPU",
        weights=weights_of_rank(model, ranks) * number_bytes,
        page_bytes=kv_of_token(model, ranks) * config.page_size * number_bytes,
        page_size=config.page_size,
    )


def tightest(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Of the plans of ranks 0, 1, ..., the one with the fewest pages: it limits the group, and names its rank."""
    pages = [plan.num_pages if plan.room is None else plan.room // plan.page_bytes for plan in plans]
    rank = pages.index(min(pages))
    if max(pages) > min(pages):
        log.info("rank %d limits the group: room for %d pages, others have up to %d", rank, min(pages), max(pages))
    return replace(plans[rank], place=f"rank {rank}, {plans[rank].place}")


def check_weights(plan: MemoryPlan) -> None:
    """ValueError if the weights alone are too much; `plan` is that of a rank which has not loaded them yet."""
    if plan.room is not None and plan.room < plan.page_bytes:
        assert plan.allowed is not None
        left = max(0, plan.allowed - plan.at_start)
        raise ValueError(
            f"the weights need {size(plan.weights)}, and {plan.place} has {size(left)} for them with"
            f" {plan.share_text} and {size(plan.at_start)} in use; {_more_room(plan, 1)}{plan.neighbours}"
        )


def check_kv_cache(asked: Config, plan: MemoryPlan) -> None:
    """ValueError if nothing fits, or not the pages, GiB or context that `asked`, the user's own Config, names."""
    flag = _sizing_flag(asked, plan)
    least = -(-MIN_TOKENS // plan.page_size)
    if plan.room is not None and plan.room < least * plan.page_bytes:
        raise ValueError(_no_room(plan, least))
    if plan.room is not None and plan.kv_cache > plan.room:
        largest = plan.room // plan.page_bytes if flag == "num_pages" else f"{_gib(plan.room, math.floor):.3f}"
        raise ValueError(
            f"{flag}={getattr(asked, flag)} is {size(plan.kv_cache)} of KV cache, and {plan.place} has"
            f" {size(plan.room)} left for it with {plan.share_text}; use {flag}={largest} or less, or"
            f" {_more_room(plan, plan.num_pages)}{plan.neighbours}"
        )
    if plan.num_pages < least:
        raise ValueError(
            f"{flag}={getattr(asked, flag)} holds {plan.num_pages} pages of {plan.page_size} tokens,"
            f" {size(plan.page_bytes)} each, and a request needs {MIN_TOKENS} tokens; {_raise(flag, plan, least)}"
        )
    if asked.max_model_len is not None and plan.tokens < asked.max_model_len:
        needed = -(-asked.max_model_len // plan.page_size)
        raise ValueError(
            f"max_model_len={asked.max_model_len} needs more than the {plan.tokens} tokens that the KV cache holds:"
            f" {size(needed * plan.page_bytes)} instead of {size(plan.kv_cache)}; use max_model_len={plan.tokens} or"
            f" less, or {_raise(flag, plan, needed)}{plan.neighbours}"
        )


def size(amount: int) -> str:
    """Bytes for people: `14.96 GiB`, `7.4 MiB`, `0.5 KiB`."""
    if abs(amount) >= 0.1 * GIB:
        return f"{amount / GIB:.2f} GiB"
    return f"{amount / 2**20:.1f} MiB" if abs(amount) >= 2**20 else f"{amount / 2**10:.1f} KiB"


def loading_speed(weights: int, seconds: float) -> str:
    """`14.96 GiB in 1.9 s, 7.9 GiB/s`."""
    return f"{size(weights)} in {seconds:.1f} s, {weights / GIB / seconds:.1f} GiB/s"


def _no_room(plan: MemoryPlan, least: int) -> str:
    assert plan.allowed is not None
    return (
        f"no room for the KV cache: {size(plan.weights)} of weights, {size(plan.graphs)} of CUDA graphs,"
        f" {size(plan.workspaces)} of workspaces and {size(plan.at_start)} in use before make {size(plan.taken)}, and"
        f" {plan.share_text} allows {size(plan.allowed)} of {plan.place}; {_more_room(plan, least)}, or lower"
        f" max_num_batched_tokens or max_num_seqs{plan.neighbours}"
    )


def _sizing_flag(asked: Config, plan: MemoryPlan) -> str:
    """The flag that the size of the KV cache comes from."""
    if asked.num_pages is not None:
        return "num_pages"
    return "kv_cache_memory" if asked.kv_cache_memory is not None or plan.total is None else "gpu_memory_utilization"


def _raise(flag: str, plan: MemoryPlan, pages: int) -> str:
    """How `flag` gives this many pages."""
    if flag == "gpu_memory_utilization":
        return _more_room(plan, pages)
    value = pages if flag == "num_pages" else f"{_gib(pages * plan.page_bytes, math.ceil):.3f}"
    return f"raise {flag} to {value}"


def _more_room(plan: MemoryPlan, pages: int) -> str:
    """How the GPU gets room for this many pages."""
    least = plan.least_utilization(pages * plan.page_bytes)
    return f"raise gpu_memory_utilization to {least:g}" if least <= 1 else "use a larger tensor_parallel_size"


def _gib(amount: int, rounding: Callable[[float], int]) -> float:
    """In thousandths of a GiB."""
    return rounding(1000 * amount / GIB) / 1000
