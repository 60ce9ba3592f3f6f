"""Each step with piecewise graphs computed twice: by the graphs, and launch by launch with as much padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lockstep.comm.base import Communicator
from lockstep.kernels import state_ops
from lockstep.kernels.arguments import KVCache, StateRows
from lockstep.runtime.config import Config
from lockstep.runtime.engine import Engine
from lockstep.runtime.model.attention.backend import Heads
from lockstep.runtime.model.batch import Batch
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.norm import Residual
from lockstep.runtime.model.state_pool import LayerStates, StatePool
from lockstep.runtime.request import Request
from lockstep.runtime.runner.graphs import decode_rows
from lockstep.runtime.runner.piecewise_graphs import PiecewiseGraphs, SkippedAttention
from lockstep.runtime.runner.rank_memory import RankMemory
from lockstep.runtime.scheduler.scheduler import Scheduler
from lockstep.runtime.startup import LoadedRank, plan_limits

from engines import OPTIONS, Results


class PaddedAttention(SkippedAttention):
    """Attention and the delta rule of a planned batch, for tensors with padding behind its tokens."""

    def __init__(self, graphs: PiecewiseGraphs, batch: Batch, size: int, memory: RankMemory) -> None:
        super().__init__(graphs._attention_out[:size], graphs._delta_net_out[:size])
        self.count, self.memory, self.rows = len(batch.token_ids), memory, batch.state_rows

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Tensor:
        n = self.count
        self.memory.attention.run(qkv[:n], heads, cache, self.attention_out[:n])
        return self.attention_out

    def delta_net(self, x: Tensor, z: Tensor, gates: Tensor, *arguments: Any, batch_invariant: bool) -> Tensor:
        tokens = (tensor[: self.count] for tensor in (x, z, gates))
        self.delta_net_out[: self.count] = state_ops.delta_net_(*tokens, *arguments, batch_invariant=batch_invariant)
        return self.delta_net_out


class PaddedStates(StatePool):
    """The states of a rank, with the delta rule of a PaddedAttention."""

    def __init__(self, states: StatePool, attention: PaddedAttention) -> None:
        self._states, self._attention = states, attention

    def layers(self, rows: StateRows | None) -> Iterator[LayerStates]:
        for layer in self._states.layers(self._attention.rows):
            yield layer._replace(delta_net=self._attention.delta_net)


def padded_step(graphs: PiecewiseGraphs, batch: Batch, memory: RankMemory) -> Residual:
    """Do `PiecewiseGraphs.forward` launch by launch, without a lasting change of the states."""
    count = len(batch.token_ids)
    size = next(size for size in graphs.sizes if size >= count)
    graphs._token_ids[:count], graphs._positions[:count] = batch.token_ids, batch.positions
    ids, positions = graphs._token_ids[:size], graphs._positions[:size]
    padded = Batch(
        token_ids=ids,
        positions=positions,
        kv_slots=[],
        page_table_rows=positions,
        device_page_table=[],
        host=decode_rows(0, memory.tables.num_tables),
    )
    attention, states = PaddedAttention(graphs, batch, size, memory), memory.states
    if states is None:
        residual = memory.decoder.forward(padded, memory.pool, attention)
    else:
        before = states._inputs.clone(), states._sums.clone()
        residual = memory.decoder.forward(padded, memory.pool, attention, PaddedStates(states, attention))
        states._inputs.copy_(before[0]), states._sums.copy_(before[1])
    partial = None if residual.partial is None else residual.partial[:count].clone()
    return replace(residual, total=residual.total[:count].clone(), partial=partial)


class Comparison:
    """The steps of a run: tokens of each, whether rows of it decoded, and whether both ways gave the same bits."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool, bool]] = []
        self.results = Results()

    def forward(self, forward: Callable[..., Residual]) -> Callable[..., Residual]:
        """Return `PiecewiseGraphs.forward` that compares."""

        def compared(graphs: PiecewiseGraphs, batch: Batch, memory: RankMemory) -> Residual:
            expected, actual = padded_step(graphs, batch, memory), forward(graphs, batch, memory)
            same = torch.equal(actual.total, expected.total)
            if expected.partial is not None:
                assert actual.partial is not None
                same = same and torch.equal(actual.partial, expected.partial)
            self.steps.append((len(batch.token_ids), 0 < batch.host.num_decoding < batch.host.num_rows, same))
            return actual

        return compared


def compare_piecewise(comm: Communicator, folder: Path, requests: Sequence[Request], **options: Any) -> Comparison:
    """Run all requests to their end on this rank. Each rank has a scheduler, and all of them plan alike."""
    asked = Config(model=str(folder), tensor_parallel_size=comm.size, **{**OPTIONS, **options})
    model = ModelConfig.from_folder(folder).quantized_by(asked.quantization)
    config = asked.resolved(model, cuda=asked.device == "cuda")
    comparison = Comparison()
    with torch.inference_mode():
        loaded = LoadedRank(config, model, folder, comm)
        limits = plan_limits(asked, config, model, loaded.plan_memory())
        runner = loaded.allocate(limits)
        del loaded
        engine = Engine(Scheduler(limits), runner, publish=lambda plan: None, overlap=runner.overlaps)
        engine.add(requests)
        with mock.patch.object(PiecewiseGraphs, "forward", comparison.forward(PiecewiseGraphs.forward)):
            while engine.has_work:
                comparison.results.take(engine.step())
        runner.close()
    return comparison
