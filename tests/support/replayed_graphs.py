"""A stand-in for CUDA graphs on a CPU, which runs a captured step again when it is replayed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.kernels import expert_ops
from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.model.attention.backend import BatchInvariantAttention
from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.model.kv_pool import AttentionShape
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.runner import graphs, piecewise_graphs
from lockstep.runtime.runner.graphs import GraphInputs
from lockstep.runtime.runner.rank_memory import PinnedReadback, RankMemory, TokenCopy

from ranks import ThreadRank


class Recorder(TorchDispatchMode):
    """Keep the operations of torch that run, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._is_inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.record(function, args, kwargs or {})

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function as one operation."""
        was_inside, self._is_inside = self._is_inside, True
        result = function(*args, **kwargs)
        self._is_inside = was_inside
        if not was_inside:
            self.calls.append((function, args, kwargs, result))
        return result

    def repeat(self) -> None:
        """Run the operations again, and write their results to the places of the first ones."""
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def poison(self) -> None:
        """Overwrite the memory that was allocated while recording, as other graphs of the same memory pool may."""
        known: set[int] = set()
        for _, args, kwargs, result in self.calls:
            known |= {memory_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and memory_of(tensor) not in known:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 1)


class Capture(threading.local):
    """The capture in this thread: of a step by torch.cuda.graph, or of operations by a recorder."""

    graph: ReplayedGraph | None = None
    recorder: Recorder | None = None


CAPTURE = Capture()


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class ReplayedGraph:
    """A stand-in for torch.cuda.CUDAGraph that calls a function, or repeats the operations of torch in between."""

    num_replays = 0

    def __init__(self) -> None:
        self.function: Callable[[], object] = lambda: None
        self._recorder = Recorder()

    def pool(self) -> None: ...

    def capture_begin(self, **options: Any) -> None:
        assert not gc.isenabled()
        CAPTURE.recorder = self._recorder
        self._recorder.__enter__()

    def capture_end(self) -> None:
        self._recorder.__exit__(None, None, None)
        CAPTURE.recorder = None
        self.function = self._recorder.repeat

    def poison(self) -> None:
        self._recorder.poison()

    def replay(self) -> None:
        ReplayedGraph.num_replays += 1
        self.function()


@contextmanager
def capture(graph: ReplayedGraph, **options: Any) -> Iterator[None]:
    assert not gc.isenabled()
    CAPTURE.graph = graph
    yield
    CAPTURE.graph = None


def recorded_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, recorded as one operation: its parts depend on data, or on other threads."""

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = CAPTURE.recorder
        return function(*args, **kwargs) if recorder is None else recorder.record(function, args, kwargs)

    return call


def use_replayed_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    step, resample, start = graphs.decode_step, graphs.resample_candidates, PinnedReadback.start

    def recorded_step(memory: RankMemory, inputs: GraphInputs) -> tuple[Logits, Tensor]:
        logits, sampled = step(memory, inputs)

        def replay() -> None:
            new_logits, new_sampled = step(memory, inputs)
            logits.shard.copy_(new_logits.shard)
            sampled.copy_(new_sampled)

        if CAPTURE.graph is not None:
            CAPTURE.graph.function = replay
        return logits, sampled

    def recorded_resample(memory: RankMemory, inputs: GraphInputs, logits: Logits, sampled: Tensor) -> Tensor:
        resampled = resample(memory, inputs, logits, sampled)
        if CAPTURE.graph is not None:
            CAPTURE.graph.function = lambda: resampled.copy_(resample(memory, inputs, logits, sampled))
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
    for module in (graphs, piecewise_graphs):
        monkeypatch.setattr(module, "capture_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(expert_ops, "experts", recorded_whole(expert_ops.experts))
    monkeypatch.setattr(graphs, "decode_step", recorded_step)
    monkeypatch.setattr(graphs, "resample_candidates", recorded_resample)
    monkeypatch.setattr(PinnedReadback, "start", start_copy)
    monkeypatch.setattr(startup, "select_backend", batch_invariant)
    monkeypatch.setattr(ThreadRank, "capturable", True)
    monkeypatch.setattr(ThreadRank, "_exchange", recorded_whole(ThreadRank._exchange))
    monkeypatch.setattr(ReplayedGraph, "num_replays", 0)
