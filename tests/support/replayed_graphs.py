"""A stand-in for CUDA graphs on a CPU, which runs a captured step again when it is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.model.attention.backend import BatchInvariantAttention
from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.model.kv_pool import AttentionShape
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.runner.graphs import DecodeGraphs, GraphInputs
from lockstep.runtime.runner.rank_memory import PinnedReadback, TokenCopy

from ranks import ThreadRank


class ReplayedGraph:
    """A stand-in for torch.cuda.CUDAGraph that calls a function."""

    num_replays = 0
    capturing: ReplayedGraph | None = None

    def __init__(self) -> None:
        self.function: Callable[[], object] = lambda: None

    def pool(self) -> None: ...

    def replay(self) -> None:
        ReplayedGraph.num_replays += 1
        self.function()


@contextmanager
def capture(graph: ReplayedGraph, **options: Any) -> Iterator[None]:
    ReplayedGraph.capturing = graph
    yield
    ReplayedGraph.capturing = None


def use_replayed_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    step, resample, start = DecodeGraphs._step, DecodeGraphs._resample, PinnedReadback.start

    def recorded_step(self: DecodeGraphs, inputs: GraphInputs) -> tuple[Logits, Tensor]:
        logits, sampled = step(self, inputs)

        def replay() -> None:
            new_logits, new_sampled = step(self, inputs)
            logits.shard.copy_(new_logits.shard)
            sampled.copy_(new_sampled)

        if ReplayedGraph.capturing is not None:
            ReplayedGraph.capturing.function = replay
        return logits, sampled

    def recorded_resample(self: DecodeGraphs, inputs: GraphInputs, logits: Logits, sampled: Tensor) -> Tensor:
        resampled = resample(self, inputs, logits, sampled)
        if ReplayedGraph.capturing is not None:
            ReplayedGraph.capturing.function = lambda: resampled.copy_(resample(self, inputs, logits, sampled))
        return resampled

    def batch_invariant(
        config: Config, model: ModelConfig, shape: AttentionShape, *arguments: Any, **options: Any
    ) -> BatchInvariantAttention:
        assert config.max_model_len is not None
        return BatchInvariantAttention(shape, model.head_dim**-0.5, set(model.windows), config.max_model_len)

    def start_copy(self: PinnedReadback, tokens: Tensor) -> TokenCopy:
        return start(self, tokens.clone())  # the next replay overwrites them; a GPU copies them to pinned memory

    monkeypatch.setattr(torch.cuda, "CUDAGraph", ReplayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(DecodeGraphs, "_step", recorded_step)
    monkeypatch.setattr(DecodeGraphs, "_resample", recorded_resample)
    monkeypatch.setattr(PinnedReadback, "start", start_copy)
    monkeypatch.setattr(startup, "select_backend", batch_invariant)
    monkeypatch.setattr(ThreadRank, "capturable", True)
    monkeypatch.setattr(ReplayedGraph, "num_replays", 0)
