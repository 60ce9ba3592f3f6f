"""Steps with prompts as piecewise CUDA graphs: one graph from the attention of a layer to that of the next.

Attention and the delta rule depend on the rows of a step, and are launched from Python. Everything else depends on the
number of tokens alone. Python needs about six launches a layer for it, which takes longer than the GPU computes
hundreds of tokens of a small model. A step is padded to the next captured number of tokens. Attention gets the tokens
of the step alone, so padding stores no keys, and nothing reads its results.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.arguments import DeltaLayer, KVCache, StateRows
from ...kernels.graph_capture import paused_collection
from ..model.attention.backend import AttentionBackend, Heads
from ..model.batch import Batch
from ..model.norm import Residual
from ..model.state_pool import LayerStates, StatePool
from .graphs import capture_stream, decode_rows
from .rank_memory import RankMemory

# Multiply-adds of an H200 in 0.5 ms, the time in which Python launches a layer.
MULTIPLY_ADDS_DURING_LAUNCHES = 150e9


@dataclass(frozen=True)
class AttentionCall:
    """A layer's attention between two graphs: the arguments of AttentionBackend.run of `size` tokens."""

    qkv: Tensor  # [size, F], written by the graph before, which has the memory
    heads: Heads
    out: Tensor  # [size, H E], read by the next graph

    def run(self, count: int, backend: AttentionBackend, cache: KVCache) -> None:
        """Compute attention of the first `count` tokens, those of the batch that `backend` has planned."""
        backend.run(self.qkv[:count], self.heads, cache, self.out[:count])


@dataclass(frozen=True)
class DeltaNetCall:
    """A layer's gated delta rule between two graphs: the arguments of delta_net_ of `size` tokens."""

    x: Tensor  # x, z and gates are [size, ...], written by the graph before, which has the memory
    z: Tensor
    gates: Tensor
    layer: DeltaLayer
    batch_invariant: bool
    out: Tensor  # [size, Hv Ev], read by the next graph

    def run(self, count: int, states: LayerStates) -> None:
        """Compute the rule for the first `count` tokens, those of the rows of `states`."""
        tokens, invariant = (self.x[:count], self.z[:count], self.gates[:count]), self.batch_invariant
        memory = states.inputs, states.sums, states.rows
        self.out[:count].copy_(states.delta_net(*tokens, self.layer, *memory, batch_invariant=invariant))


class SkippedAttention:
    """An AttentionBackend, and a function for the delta rule, that compute nothing and return fixed memory.

    attention_out  [size, H E], in place of the result of attention
    delta_net_out  [size, Hv Ev], in place of that of the delta rule
    """

    capturable = True
    host_s = 0.0

    def __init__(self, attention_out: Tensor, delta_net_out: Tensor) -> None:
        self.attention_out, self.delta_net_out = attention_out, delta_net_out

    def plan(self, batch: Batch) -> None: ...

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Tensor:
        return self.attention_out

    def delta_net(
        self, x: Tensor, z: Tensor, gates: Tensor, layer: DeltaLayer, *states: Any, batch_invariant: bool
    ) -> Tensor:
        return self.delta_net_out


class GraphBreaks(SkippedAttention):
    """A capture in which each attention and each delta rule ends a graph, and begins the next one."""

    def __init__(self, attention_out: Tensor, delta_net_out: Tensor, pool: Any) -> None:
        super().__init__(attention_out, delta_net_out)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.calls: list[AttentionCall | DeltaNetCall] = []
        self._pool = pool

    def begin(self) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        # Not by torch.cuda.graph, which waits for the device and empties the allocator's cache.
        self.graphs[-1].capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self.graphs[-1].capture_end()

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Tensor:
        self.end()
        self.calls.append(AttentionCall(weak_reference(qkv), heads, self.attention_out))
        self.begin()
        return self.attention_out

    def delta_net(
        self, x: Tensor, z: Tensor, gates: Tensor, layer: DeltaLayer, *states: Any, batch_invariant: bool
    ) -> Tensor:
        self.end()
        x, z, gates = weak_reference(x), weak_reference(z), weak_reference(gates)
        self.calls.append(DeltaNetCall(x, z, gates, layer, batch_invariant, self.delta_net_out))
        self.begin()
        return self.delta_net_out


class SkippedStates(StatePool):
    """States of `num_layers` layers without memory; the delta rule is that of `attention`."""

    def __init__(self, num_layers: int, attention: SkippedAttention) -> None:
        self._num_layers, self._attention = num_layers, attention

    def layers(self, rows: StateRows | None) -> Iterator[LayerStates]:
        nothing = torch.empty(0)
        for _ in range(self._num_layers):
            yield LayerStates(nothing, nothing, StateRows(nothing, nothing), self._attention.delta_net)


@dataclass(frozen=True)
class CapturedStep:
    """The graphs of one number of tokens, what runs between them, and the stream after the last layer."""

    graphs: list[torch.cuda.CUDAGraph]
    calls: list[AttentionCall | DeltaNetCall]
    residual: Residual  # [size, D]; the graphs have the memory


class PiecewiseGraphs:
    """One rank's graphs for steps of up to `max_tokens` tokens, whatever their rows.

    They contain neither the KV cache nor the tables nor the states of a RankMemory, so they serve each that has this
    decoder.

    sizes  the numbers of tokens to capture, in increasing order; the same on all ranks
    pool   the memory pool of the decode graphs. One step runs at a time, so all graphs may use the same memory
    """

    def __init__(self, memory: RankMemory, sizes: list[int], pool: Any) -> None:
        self.sizes, self.max_tokens = sizes, sizes[-1]
        shape, device, dtype = memory.pool.shape, memory.device, memory.pool.shape.dtype
        states = memory.decoder.state_shape(dtype)
        state_features = 0 if states is None else states.heads * states.value_size
        # Zeros, not memory as it comes: the tokens of padding are looked up, and their experts chosen.
        self._token_ids, self._positions = torch.zeros(2, self.max_tokens, dtype=torch.int32, device=device)
        self._attention_out = torch.zeros(self.max_tokens, shape.num_heads * shape.head_dim, dtype=dtype, device=device)
        self._delta_net_out = torch.zeros(self.max_tokens, state_features, dtype=dtype, device=device)
        # The largest size comes first: the smaller ones then fit into its memory.
        for size in sizes[::-1]:  # outside of the graphs: it loads kernels and grows workspaces
            self._run(size, memory, SkippedAttention(*self._outputs(size)))
        self._captured = {size: self._capture(size, memory, pool) for size in sizes[::-1]}

    def forward(self, batch: Batch, memory: RankMemory) -> Residual:
        """Do `Decoder.forward` for a batch of up to `max_tokens` tokens that memory.attention has planned.

        The next call overwrites the result.
        """
        count, attention = len(batch.token_ids), memory.attention
        captured = self._captured[self.sizes[bisect.bisect_left(self.sizes, count)]]
        self._token_ids[:count].copy_(batch.token_ids)
        self._positions[:count].copy_(batch.positions)
        caches = map(memory.pool.layer, memory.decoder.places)
        states = iter([] if memory.states is None else memory.states.layers(batch.state_rows))
        for graph, call in zip(captured.graphs[:-1], captured.calls, strict=True):
            graph.replay()
            if isinstance(call, AttentionCall):
                call.run(count, attention, next(caches))
            else:
                call.run(count, next(states))
        captured.graphs[-1].replay()
        return _map_residual(captured.residual, lambda tensor: tensor[:count])

    def _capture(self, size: int, memory: RankMemory, pool: Any) -> CapturedStep:
        breaks = GraphBreaks(*self._outputs(size), pool)
        with paused_collection(), torch.cuda.stream(capture_stream()):
            breaks.begin()
            try:
                residual = self._run(size, memory, breaks)
            finally:
                breaks.end()  # else the stream would go on capturing after an error
        for graph in breaks.graphs:  # takes the memory that a graph needs to run, before the KV cache is sized
            graph.replay()
        return CapturedStep(breaks.graphs, breaks.calls, _map_residual(residual, weak_reference))

    def _run(self, size: int, memory: RankMemory, attention: SkippedAttention) -> Residual:
        """Launch a step of `size` tokens up to the stream after the last layer."""
        decoder, net = memory.decoder, memory.decoder.config.delta_net
        batch = Batch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            kv_slots=[],
            page_table_rows=self._positions[:size],
            device_page_table=[],
            host=decode_rows(0, memory.tables.num_tables),
        )
        states = None if net is None else SkippedStates(len(net.layers), attention)
        return decoder.forward(batch, memory.pool, attention, states)

    def _outputs(self, size: int) -> tuple[Tensor, Tensor]:
        return self._attention_out[:size], self._delta_net_out[:size]


def _map_residual(residual: Residual, function: Callable[[Tensor], Tensor]) -> Residual:
    """Return the stream with the function's result for each tensor."""
    partial = None if residual.partial is None else function(residual.partial)
    return replace(residual, total=function(residual.total), partial=partial)


def weak_reference(tensor: Tensor) -> Tensor:
    """Return the tensor without a share in its memory, which another graph may then use; on a CPU the same tensor.

    Call it outside of a capture: CuPy makes torch's stream wait for its own.
    """
    if not tensor.is_cuda:
        return tensor
    from ...kernels.peer_memory import view  # needs CuPy

    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = view(tensor.data_ptr(), elements * tensor.element_size(), tensor.get_device())
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def max_piecewise_tokens(layer_parameters: float) -> int:
    """Return the largest number of tokens for which Python launches a layer in more time than a GPU computes it.

    layer_parameters  parameters of a layer of one rank that a token is multiplied by
    """
    return int(MULTIPLY_ADDS_DURING_LAUNCHES / layer_parameters)


def piecewise_sizes(max_tokens: int) -> list[int]:
    """Return the numbers of tokens to capture: equal steps up to `max_tokens`, and 8, 16, 32, ... below the first.

    A step is a multiple of 64 tokens, and there are 16 at most: padding is less than `max_tokens` / 16 + 64 tokens.
    Steps are equal because padding costs time in large sizes only. A GPU computes the smaller ones in less time than
    Python launches their attention.
    """
    step = 64 * -(-max_tokens // (16 * 64))
    sizes = [*(8 << n for n in range(step.bit_length()) if 8 << n < step), *range(step, max_tokens, step)]
    return [*(size for size in sizes if size < max_tokens), max_tokens]
