"""Decode steps as CUDA graphs: captured once for each padded number of rows, replayed with other inputs.

A launch from Python costs more than many a decode kernel runs; a graph launches a whole step at once. Inputs lie in
static buffers. Padding rows store no keys, and their results are not read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...kernels.graph_capture import capture
from ..model.batch import HostBatch
from ..model.embedding import Logits
from ..sampling.sampler import GREEDY, PARAMS, ROW_PARAMS, RowParams, sample_candidates, sample_gumbel_max
from .rank_memory import RankMemory


class GraphInputs:
    """The static inputs of a graph of `size` rows, in one buffer: a single copy brings a step to the device."""

    # Wider types come first, so that all fields are aligned.
    TYPES = {name: PARAMS[name] for name in ROW_PARAMS} | dict.fromkeys(
        ("slots", "positions", "kv_slots"), np.dtype(np.int32)
    )

    def __init__(self, size: int, device: torch.device, num_tables: int = 1) -> None:
        self.size = size
        lengths = [dtype.itemsize * size for dtype in self.TYPES.values()]
        lengths[-1] *= num_tables
        self._host = np.zeros(sum(lengths), np.uint8)
        self._device = torch.zeros(sum(lengths), dtype=torch.uint8, device=device)
        parts = np.split(self._host, np.cumsum(lengths)[:-1])
        self._fields = {name: part.view(dtype) for part, (name, dtype) in zip(parts, self.TYPES.items(), strict=True)}
        on_device = {
            name: part.view(torch.from_numpy(field).dtype)
            for part, (name, field) in zip(self._device.split(lengths), self._fields.items(), strict=True)
        }
        self.params = RowParams(**{name: on_device[name] for name in ROW_PARAMS})
        self.slots, self.positions = on_device["slots"], on_device["positions"]
        self._fields["kv_slots"] = self._fields["kv_slots"].reshape(num_tables, size)
        self.kv_slots = on_device["kv_slots"].view(num_tables, size)

    def fill(self, host: HostBatch, params: np.ndarray, spare_slot: int) -> None:
        """Copy a step to the device; padding rows belong to the spare slot, are greedy and store no keys."""
        n = len(host.slots)
        for name in ROW_PARAMS:
            self._fields[name][:n], self._fields[name][n:] = params[name], GREEDY[name]
        for name, values, padding in (
            ("slots", host.slots, spare_slot),
            ("positions", host.positions, 0),
            ("kv_slots", host.kv_slots, -1),
        ):
            self._fields[name][..., :n], self._fields[name][..., n:] = values, padding
        # The driver copies this little pageable memory within the call: the host may write the next step's at once.
        self._device.copy_(torch.from_numpy(self._host), non_blocking=True)


@dataclass(frozen=True)
class CapturedGraphs:
    """Two graphs of one size: a step that samples by Gumbel-max, and one that samples again, among candidates."""

    step: torch.cuda.CUDAGraph
    resample: torch.cuda.CUDAGraph
    inputs: GraphInputs
    logits: Logits  # logits of `size` rows
    sampled: Tensor  # [size] int32, by Gumbel-max
    resampled: Tensor  # [size] int32: `sampled`, or among candidates where the row has a top_k


class DecodeGraphs:
    """The graphs of one rank for up to `max_rows` rows: a step from the slots' last tokens to their next ones.

    They use the memory pool of `reuse` again: that graph and its siblings must not be replayed any more. `reuse` is a
    graph of another DecodeGraphs of the same sizes, which has loaded their kernels.
    """

    def __init__(
        self, memory: RankMemory, max_rows: int, *, reuse: torch.cuda.CUDAGraph | None = None, show_progress: bool
    ) -> None:
        self.max_rows, self.sizes, self._memory = max_rows, graph_sizes(max_rows), memory
        self._captured: dict[int, CapturedGraphs] = {}
        # The largest size comes first: the smaller ones then fit into its memory.
        inputs = {size: padding_inputs(memory, size) for size in self.sizes[::-1]}
        if reuse is None:
            # Runs outside of the graphs load kernels and grow workspaces. They come before all captures: each capture
            # gives unused memory back to the driver, and the next run would have to allocate it again.
            for padding in inputs.values():
                resample_candidates(memory, padding, *decode_step(memory, padding))
        pool_owner = reuse
        for size, padding in tqdm(inputs.items(), desc="capture CUDA graphs", unit="graph", disable=not show_progress):
            step, resample = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            pool = pool_owner.pool() if pool_owner else None
            with capture(step, pool=pool, stream=capture_stream()):
                logits, sampled = decode_step(memory, padding)
            pool_owner = pool_owner or step
            with capture(resample, pool=pool_owner.pool(), stream=capture_stream()):
                resampled = resample_candidates(memory, padding, logits, sampled)
            self._captured[size] = CapturedGraphs(step, resample, padding, logits, sampled, resampled)
        self.largest = self._captured[self.max_rows].step  # keeps the memory pool of all of them alive

    def run(self, host: HostBatch, params: np.ndarray, *, with_candidates: bool) -> tuple[Logits, Tensor]:
        """Replay a step; return the logits of its B rows and the sampled tokens [B], which are in the token table.

        params           [B] PARAMS, as Sampler.rows returned them
        with_candidates  a row has the method CANDIDATES
        Both results are overwritten by the next run of the same padded size.
        """
        num_rows = len(host.slots)
        captured = self._captured[next(size for size in self.sizes if size >= num_rows)]
        captured.inputs.fill(host, params, self._memory.tables.spare_slot)
        captured.step.replay()
        if with_candidates:
            captured.resample.replay()
        return captured.logits[:num_rows], (captured.resampled if with_candidates else captured.sampled)[:num_rows]


def padding_inputs(memory: RankMemory, size: int) -> GraphInputs:
    """Return the inputs of `size` rows of padding."""
    inputs = GraphInputs(size, memory.device, memory.tables.num_tables)
    inputs.fill(decode_rows(0, memory.tables.num_tables), np.empty(0, PARAMS), memory.tables.spare_slot)
    return inputs


def decode_step(memory: RankMemory, inputs: GraphInputs) -> tuple[Logits, Tensor]:
    """Run a step from the slots' last tokens to their next ones; return the logits and the tokens [size] int32."""
    tables = memory.tables
    rows = decode_rows(inputs.size, tables.num_tables)
    batch = tables.decode_batch(inputs.slots, inputs.positions, inputs.kv_slots, rows)
    memory.attention.plan(batch)
    logits = memory.decoder.logits(memory.decoder.forward(batch, memory.pool, memory.attention, memory.states))
    sampled = sample_gumbel_max(logits, inputs.params)
    tables.append(inputs.slots, inputs.positions, sampled)
    return logits, sampled


def resample_candidates(memory: RankMemory, inputs: GraphInputs, logits: Logits, sampled: Tensor) -> Tensor:
    """Sample the rows with a top_k among candidates instead; return the tokens of all rows, [size] int32."""
    resampled = torch.where(inputs.params.top_k > 0, sample_candidates(logits, inputs.params), sampled)
    memory.tables.append(inputs.slots, inputs.positions, resampled)
    return resampled


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """Return the stream of all captures: graphs reuse the memory of others that were captured in the same stream."""
    return torch.cuda.Stream()


def graph_sizes(max_rows: int) -> list[int]:
    """Return the numbers of rows to capture: 1, 2, 4, then every 8 up to 128, then every 16."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max_rows, 16)]
    return [*(s for s in sizes if s < max_rows), max_rows]


def decode_rows(count: int, num_tables: int) -> HostBatch:
    """Return the metadata of `count` decoding rows; their slots and positions are on the device only."""
    zeros = np.zeros(count, np.int32)
    return HostBatch(
        slots=zeros,
        positions=zeros,
        kv_slots=np.zeros((num_tables, count), np.int32),
        page_table=np.zeros((num_tables, count, 1), np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=zeros + 1,
        num_decoding=count,
    )
