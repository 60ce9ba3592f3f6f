"""Decode graphs on a CPU: a stand-in for CUDA graphs runs a captured step again when it is replayed.

BatchInvariantAttention runs on a CPU by the definitions of its ops. Tokens must be those of the eager path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.model.attention.backend import BatchInvariantAttention
from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.model.kv_pool import AttentionShape
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.request import Request
from lockstep.runtime.runner.graphs import DecodeGraphs, GraphInputs, graph_sizes
from lockstep.runtime.runner.rank_memory import PinnedReadback, TokenCopy

from engines import request, run_engine
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


GUMBEL_MAX = [{"temperature": 0.0}, {"temperature": 1.0}]
CANDIDATES = [*GUMBEL_MAX, {"temperature": 0.8, "top_k": 7}]
GATHERED = [*CANDIDATES, {"temperature": 1.0, "top_p": 0.8}, {"logprobs": 3}, {"repetition_penalty": 1.3}]


def requests(params: list[dict[str, Any]]) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 131, int(rng.integers(1, 30))).tolist() for _ in range(13)]
    return [request(i, prompt, [2], max_tokens=20, **params[i % len(params)]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("params", "replays_per_step"), [(GUMBEL_MAX, 1), (CANDIDATES, 2), (GATHERED, 1)], ids=["max", "top-k", "gathered"]
)
def test_replayed_steps_give_the_tokens_of_eager_ones(
    llama_folder: Path,
    params: list[dict[str, Any]],
    replays_per_step: int,
    overlap: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run_engine(llama_folder, requests(params))
    use_replayed_graphs(monkeypatch)
    actual = run_engine(llama_folder, requests(params), overlap=overlap)
    assert actual.tokens == expected.tokens
    assert actual.finished == expected.finished
    assert actual.logprobs.keys() == expected.logprobs.keys()
    assert ReplayedGraph.num_replays >= 15 * replays_per_step


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100, 128, 129, 256])
def test_graph_sizes_end_with_the_largest(max_rows: int) -> None:
    sizes = graph_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
