"""The memory plan of one rank, and the errors for a plan that does not fit.

A MemoryPlan holds plain numbers, and everything is computed from them without torch; gpu.py reads a GPU.
The KV cache gets the rest of the share of the GPU that the rank may use:

    |- at start -|- weights -|- graphs -|- states -|- workspaces -|----- room: KV cache -----|- free -|
    0                                                                                     allowed   total
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...comm.message_text import format_bytes
from ..config import Config
from ..limits import longest_context, pages_at_once, pages_of_window
from ..model.model_config import DTYPES, ModelConfig
from .parameter_count import (
    float32_parameters,
    kv_elements_per_token,
    parameters_of_rank,
    saved_by_quantization,
    state_bytes,
)

log = logging.getLogger(__name__)
GIB = 2**30
CPU_KV_CACHE_GIB = 1.0  # without kv_cache_memory: other programs need the host's memory, too
OWN_CONTEXT = 768 * 2**20  # a CUDA context takes about 500 MiB: with more in use at start, another process is there
MIN_TOKENS = 2  # any request needs KV cache for two tokens: one of its prompt, one of its output


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """One rank's memory, in bytes. Only weights and KV cache are known on a CPU."""

    place: str  # "GPU 0 (NVIDIA H200, 139.81 GiB)"
    weights: int
    page_bytes: int
    page_size: int  # tokens
    num_pages: int = 0
    reduced_token_bytes: int = 0  # bytes that all-reduces sum for each token of a step
    pages_of_window: int | None = None  # the most that a step of a request needs of a layer with a window
    num_window_groups: int = 0  # groups of layers with a window, beside one that sees all keys; see LayerGroups
    total: int | None = None  # memory of the GPU; None on a CPU, where it is not measured
    utilization: float = 1.0
    gpus_per_rank: float = 1.0
    at_start: int = 0  # memory in use before this rank allocates: other processes, CUDA context
    graphs: int = 0
    num_graphs: int = 0
    graph_rows: int = 0  # rows of the largest graph
    num_piecewise: int = 0  # numbers of tokens of piecewise graphs
    piecewise_tokens: int = 0  # the largest of them
    states: int = 0  # recurrent states of the slots and of cached prefixes
    workspaces: int = 0  # activations of the largest step, workspaces, tables, kernels, libraries
    other_processes: str = ""  # the end of an error message, as gpu.other_processes returns it

    @property
    def kv_cache(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def tokens(self) -> int:
        """The longest context that the KV cache holds."""
        return longest_context(self.num_pages, self.pages_of_window, self.num_window_groups) * self.page_size

    def longest_context(self, max_model_len: int) -> int:
        """Return the longest context of a request that the KV cache allows."""
        return max_model_len if self.pages_at_once(max_model_len) <= self.num_pages else self.tokens

    def pages_at_once(self, context: int) -> int:
        """Return the pages that a request with so many tokens needs in one step at most."""
        return pages_at_once(-(-context // self.page_size), self.pages_of_window, self.num_window_groups)

    @property
    def taken(self) -> int:
        """Everything except the KV cache."""
        return self.at_start + self.weights + self.graphs + self.states + self.workspaces

    @property
    def allowed(self) -> int | None:
        """The share of the GPU that may be used, including the memory in use at start."""
        return None if self.total is None else round(self.total * self.utilization * self.gpus_per_rank)

    @property
    def room(self) -> int | None:
        """The most that the KV cache may take; negative if the rest is too much already."""
        return None if self.allowed is None else self.allowed - self.taken

    @property
    def free(self) -> int | None:
        """The memory of the whole GPU that stays free."""
        return None if self.total is None else self.total - self.taken - self.kv_cache

    def with_pages(self, config: Config) -> MemoryPlan:
        """Return the plan with the pages that `config`, which is resolved, names or that fit."""
        return replace(self, num_pages=self._num_pages(config))

    def table(self, max_model_len: int) -> str:
        """Return all parts as text, one per line."""
        context = self.longest_context(max_model_len)
        contexts = f"{self.num_pages / self.pages_at_once(context):,.1f} contexts of {context:,}"
        tokens = f"{self.tokens:,} tokens of {format_bytes(self.page_bytes // self.page_size)}: {contexts}"
        graphs = f"{self.num_graphs} captured, up to {self.graph_rows} rows"
        if self.num_piecewise:
            graphs += f"; {self.num_piecewise} piecewise, up to {self.piecewise_tokens:,} tokens"
        in_use = (
            self.other_processes.removeprefix("; ") if self.at_start > OWN_CONTEXT else "CUDA context, communication"
        )
        rows = (
            ("in use at start", self.at_start or None, in_use),
            ("weights", self.weights, ""),
            ("CUDA graphs", self.graphs if self.num_graphs else None, graphs),
            ("states", self.states or None, "of requests and cached prefixes, in layers without keys and values"),
            ("workspaces", self.workspaces or None, "activations, tables, kernels, libraries"),
            ("KV cache", self.kv_cache, tokens),
            ("free" if self.gpus_per_rank == 1 else "left to others", self.free, ""),
        )
        lines = [f"  {name:<15} {format_bytes(n):>10}   {note}".rstrip() for name, n, note in rows if n is not None]
        share = "" if self.total is None else f", {self.share_text}"
        return "\n".join([f"memory of {self.place}{share}", *lines])

    @property
    def share_text(self) -> str:
        """The flags that limit the memory."""
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
        per_seq = self.pages_at_once(config.max_model_len)
        return min(config.max_num_seqs * per_seq, max(int(CPU_KV_CACHE_GIB * GIB) // self.page_bytes, per_seq))


def plan_weights(config: Config, model: ModelConfig, rank: int = 0) -> MemoryPlan:
    """Return the plan of a rank on a CPU before it loads; rank 0 needs the most, because its shares are the largest.

    Raises ValueError if the model cannot be split over the ranks, or if no kernel of its weights takes the dtype.
    """
    ranks, itemsize = config.tensor_parallel_size, DTYPES[config.dtype]
    groups = model.layer_groups
    window = groups.window if groups.num_window_groups else model.window
    kv_itemsize = 1 if config.kv_cache_dtype == "fp8" else itemsize
    model.check_tensor_parallel(ranks)
    is_mxfp4 = model.experts is not None and model.experts.mxfp4
    if is_mxfp4 and config.device == "cuda" and config.dtype != "bfloat16":
        raise ValueError(f"dtype={config.dtype!r} cannot be used: MXFP4 experts need bfloat16 on a GPU; leave it out")
    weights = parameters_of_rank(model, ranks, rank) * itemsize + float32_parameters(model) * (4 - itemsize)
    return MemoryPlan(
        place="the CPU",
        weights=weights - saved_by_quantization(model, ranks, itemsize, rank),
        page_bytes=kv_elements_per_token(model, ranks, rank) * config.page_size * kv_itemsize,
        page_size=config.page_size,
        # Two partial sums of a layer, and the rows of the embedding.
        reduced_token_bytes=(2 * model.num_layers + 1) * model.hidden_size * itemsize if ranks > 1 else 0,
        states=num_states(config) * state_bytes(model, ranks, rank, itemsize),
        pages_of_window=None
        if window is None
        else pages_of_window(window, config.page_size, config.max_num_batched_tokens),
        num_window_groups=groups.num_window_groups,
    )


def num_states(config: Config) -> int:
    """Return the recurrent states of a rank: one for each slot, a spare one, and those of cached prefixes."""
    return config.max_num_seqs + 1 + saved_states(config)


def saved_states(config: Config) -> int:
    """Return how many cached prefixes can have a recurrent state at their end."""
    return max(2, config.max_num_seqs // 4) if config.enable_prefix_caching else 0


def tightest(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """Return the plan with the fewest pages of ranks 0, 1, ..., which limits the group; its place names the rank."""
    pages = [plan.num_pages if plan.room is None else plan.room // plan.page_bytes for plan in plans]
    rank = pages.index(min(pages))
    if max(pages) > min(pages):
        log.info("rank %d limits the group: room for %d pages, others have up to %d", rank, min(pages), max(pages))
    return replace(plans[rank], place=f"rank {rank}, {plans[rank].place}")


def check_weights(plan: MemoryPlan) -> None:
    """Raise ValueError if the weights alone do not fit; the rank of `plan` has not loaded them yet."""
    if plan.room is not None and plan.room < plan.page_bytes:
        assert plan.allowed is not None
        left = max(0, plan.allowed - plan.at_start)
        raise ValueError(
            f"the weights need {format_bytes(plan.weights)}, and {plan.place} has {format_bytes(left)} for them with"
            f" {plan.share_text} and {format_bytes(plan.at_start)} in use; {_more_room(plan, 1)}{plan.other_processes}"
        )


def check_kv_cache(requested: Config, plan: MemoryPlan) -> None:
    """Raise ValueError if nothing fits, or if the pages, GiB or context that the user's Config names do not."""
    flag = _sizing_flag(requested, plan)
    least = plan.pages_at_once(MIN_TOKENS)
    if plan.room is not None and plan.room < least * plan.page_bytes:
        raise ValueError(_no_room(plan, least))
    if plan.room is not None and plan.kv_cache > plan.room:
        largest = plan.room // plan.page_bytes if flag == "num_pages" else f"{_gib(plan.room, math.floor):.3f}"
        raise ValueError(
            f"{flag}={getattr(requested, flag)} is {format_bytes(plan.kv_cache)} of KV cache, and {plan.place} has"
            f" {format_bytes(plan.room)} left for it with {plan.share_text}; use {flag}={largest} or less, or"
            f" {_more_room(plan, plan.num_pages)}{plan.other_processes}"
        )
    if plan.num_pages < least:
        raise ValueError(
            f"{flag}={getattr(requested, flag)} holds {plan.num_pages} pages of {plan.page_size} tokens,"
            f" {format_bytes(plan.page_bytes)} each, and a request needs {MIN_TOKENS} tokens;"
            f" {_raise(flag, plan, least)}"
        )
    if requested.max_model_len is not None and plan.longest_context(requested.max_model_len) < requested.max_model_len:
        needed = plan.pages_at_once(requested.max_model_len)
        raise ValueError(
            f"max_model_len={requested.max_model_len} needs more than the {plan.tokens} tokens that the KV cache holds:"
            f" {format_bytes(needed * plan.page_bytes)} instead of {format_bytes(plan.kv_cache)};"
            f" use max_model_len={plan.tokens} or less, or {_raise(flag, plan, needed)}{plan.other_processes}"
        )


def loading_speed(weights: int, seconds: float) -> str:
    """Return `14.96 GiB in 1.9 s, 7.9 GiB/s`."""
    return f"{format_bytes(weights)} in {seconds:.1f} s, {weights / GIB / seconds:.1f} GiB/s"


def _no_room(plan: MemoryPlan, least: int) -> str:
    assert plan.allowed is not None
    states = f" {format_bytes(plan.states)} of recurrent states," if plan.states else ""
    return (
        f"no room for the KV cache: {format_bytes(plan.weights)} of weights, {format_bytes(plan.graphs)} of CUDA"
        f" graphs,{states} {format_bytes(plan.workspaces)} of workspaces and {format_bytes(plan.at_start)} in use"
        f" before make {format_bytes(plan.taken)}, and {plan.share_text} allows {format_bytes(plan.allowed)} of"
        f" {plan.place}; {_more_room(plan, least)}, or lower max_num_batched_tokens or max_num_seqs"
        f"{plan.other_processes}"
    )


def _sizing_flag(requested: Config, plan: MemoryPlan) -> str:
    """Return the flag that determines the size of the KV cache."""
    if requested.num_pages is not None:
        return "num_pages"
    return (
        "kv_cache_memory" if requested.kv_cache_memory is not None or plan.total is None else "gpu_memory_utilization"
    )


def _raise(flag: str, plan: MemoryPlan, pages: int) -> str:
    """Return the value of `flag` that gives this many pages."""
    if flag == "gpu_memory_utilization":
        return _more_room(plan, pages)
    value = pages if flag == "num_pages" else f"{_gib(pages * plan.page_bytes, math.ceil):.3f}"
    return f"raise {flag} to {value}"


def _more_room(plan: MemoryPlan, pages: int) -> str:
    """Return the change that makes room for this many pages on the GPU."""
    assert plan.total is not None
    least = math.ceil(100 * (plan.taken + pages * plan.page_bytes) / (plan.total * plan.gpus_per_rank)) / 100
    return f"raise gpu_memory_utilization to {least:g}" if least <= 1 else "use a larger tensor_parallel_size"


def _gib(amount: int, rounding: Callable[[float], int]) -> float:
    """Return bytes as GiB, rounded to 0.001."""
    return rounding(1000 * amount / GIB) / 1000
