"""Decode steps as CUDA graphs: captured once for each padded number of rows, replayed with other inputs.

A launch from Python costs more than many a decode kernel runs; a graph launches a whole step at once. Inputs lie in
static buffers; rows beyond the step's own have no slot for their keys, and nobody looks at what they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..model.attention.attention import AttentionBackend
from ..model.decoder import Decoder
from ..model.kv_pool import KVPool
from ..model.logits import Logits
from ..sampling.sampler import Bounds, draw_among_few, race
from .slot_tables import HostBatch, SlotTables


@dataclass(frozen=True)
class GraphParts:
    """What a captured step runs through; none of it may be replaced while its graphs are in use."""

    decoder: Decoder
    tables: SlotTables
    pool: KVPool
    attention: AttentionBackend


class Inputs:
    """The static inputs of a graph of `size` rows, in one buffer: a single copy brings a step to the device."""

    # What a row is drawn by, then the fields of HostBatch: wider numbers first, so that all are aligned.
    TYPES = (np.int64, np.int64, np.float32, np.float32, np.float32, np.int32, np.int32, np.int32)

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        counts = [np.dtype(t).itemsize * size for t in self.TYPES]
        cuts = np.cumsum(counts)
        self._host = np.zeros(cuts[-1], np.uint8)
        self._device = torch.zeros(int(cuts[-1]), dtype=torch.uint8, device=device)
        self._parts = [part.view(t) for part, t in zip(np.split(self._host, cuts[:-1]), self.TYPES, strict=True)]
        on_device = [
            part.view(torch.from_numpy(host).dtype)
            for part, host in zip(self._device.split(counts), self._parts, strict=True)
        ]
        self.bounds = Bounds(*on_device[:5])
        self.slots, self.positions, self.kv_slots = on_device[5:]

    def fill(self, host: HostBatch, bounds: Sequence[np.ndarray], spare_slot: int) -> None:
        """Rows beyond the step's own belong to the spare slot, are greedy, and store no keys."""
        n = len(host.slots)
        given = *bounds, host.slots, host.positions, host.kv_slots
        for part, values, rest in zip(self._parts, given, (0, 0, 0, 1, 0, spare_slot, 0, -1), strict=True):
            part[:n], part[n:] = values, rest
        # Few bytes from pageable memory travel with the call itself: the host may write the next step's at once.
        self._device.copy_(torch.from_numpy(self._host), non_blocking=True)


@dataclass(frozen=True)
class Captured:
    """Two graphs, and where they read and write: a step, whose tokens win a race among all, and a draw among few.

    The second one is for steps in which a row asks for that; it chooses once more from the logits of the first.
    """

    step: torch.cuda.CUDAGraph
    draw: torch.cuda.CUDAGraph
    inputs: Inputs
    logits: Logits  # of `size` rows
    raced: Tensor  # [size] int32
    drawn: Tensor  # [size] int32: those of `raced` where a row does not ask


class DecodeGraphs:
    """The graphs of one rank for up to `max_rows` rows: a step from the slots' last tokens to their next ones.

    `memory` is that of earlier graphs, which nobody replays any more: torch would not reuse it otherwise.
    """

    def __init__(
        self, parts: GraphParts, max_rows: int, *, memory: torch.cuda.CUDAGraph | None = None, show_progress: bool
    ) -> None:
        self.max_rows = max_rows
        self._parts = parts
        self._captured: dict[int, Captured] = {}
        self._sizes = graph_sizes(max_rows)
        self._capture(memory, show_progress)

    @property
    def num_graphs(self) -> int:
        return len(self._captured)

    @property
    def memory(self) -> torch.cuda.CUDAGraph:
        """A graph that keeps the memory of all of them, also when the others are gone."""
        return self._captured[self.max_rows].step

    def run(self, host: HostBatch, bounds: Sequence[np.ndarray], *, draws_among_few: bool) -> tuple[Logits, Tensor]:
        """The logits of the B rows and the tokens [B] that are drawn from them, which are already in the token table.

        bounds           the fields of Bounds, [B] each
        draws_among_few  whether a row has a top_k, which is CANDIDATES at most then
        Both results are overwritten by the next run of the same padded size.
        """
        rows = len(host.slots)
        captured = self._captured[next(s for s in self._sizes if s >= rows)]
        captured.inputs.fill(host, bounds, self._parts.tables.spare_slot)
        captured.step.replay()
        if draws_among_few:
            captured.draw.replay()
        return captured.logits[:rows], (captured.drawn if draws_among_few else captured.raced)[:rows]

    def _capture(self, memory: torch.cuda.CUDAGraph | None, show_progress: bool) -> None:
        """The largest first: the smaller ones then fit into its memory."""
        tables, nothing = self._parts.tables, [np.zeros(0)] * 5
        for size in tqdm(self._sizes[::-1], desc="capture CUDA graphs", unit="graph", disable=not show_progress):
            inputs = Inputs(size, tables.tokens.device)
            inputs.fill(_rows(0), nothing, tables.spare_slot)
            # Outside of the graphs first: kernels load and workspaces grow.
            self._draw(inputs, *self._step(inputs))
            step, draw = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(step, pool=memory.pool() if memory else None, capture_error_mode="thread_local"):
                logits, raced = self._step(inputs)
            memory = memory or step
            with torch.cuda.graph(draw, pool=memory.pool(), capture_error_mode="thread_local"):
                drawn = self._draw(inputs, logits, raced)
            self._captured[size] = Captured(step, draw, inputs, logits, raced, drawn)

    def _step(self, inputs: Inputs) -> tuple[Logits, Tensor]:
        parts = self._parts
        batch = parts.tables.decode_batch(inputs.slots, inputs.positions, inputs.kv_slots, _rows(inputs.size))
        parts.attention.plan(batch)
        logits = parts.decoder.logits(parts.decoder.forward(batch, parts.pool, parts.attention))
        raced = race(logits, inputs.bounds)
        parts.tables.append(inputs.slots, inputs.positions, raced)
        return logits, raced

    def _draw(self, inputs: Inputs, logits: Logits, raced: Tensor) -> Tensor:
        drawn = torch.where(inputs.bounds.top_k > 0, draw_among_few(logits, inputs.bounds), raced)
        self._parts.tables.append(inputs.slots, inputs.positions, drawn)
        return drawn


def graph_sizes(max_rows: int) -> list[int]:
    """The numbers of rows to capture: 1, 2, 4, then every 8 up to 128, then every 16."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max_rows, 16)]
    return [*(s for s in sizes if s < max_rows), max_rows]


def _rows(count: int) -> HostBatch:
    """So many decode rows, of which the host knows nothing else."""
    zeros = np.zeros(count, np.int32)
    return HostBatch(
        slots=zeros,
        positions=zeros,
        kv_slots=zeros,
        page_table=np.zeros((count, 1), np.int32),
        query_starts=np.arange(count + 1, dtype=np.int32),
        kv_lengths=zeros + 1,
        num_decoding=count,
    )
