"""Decode steps as CUDA graphs: captured once for each padded number of rows, replayed with other inputs.

A launch from Python costs more than many a decode kernel runs; a graph launches a whole step at once. Inputs lie in
static buffers; rows beyond the step's own have no slot for their keys, and nobody looks at what they give.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels import ops
from .batch import Batch, HostBatch, SlotTables
from .cache.pool import KVPool
from .model.attention import AttentionBackend
from .model.decoder import Decoder

log = logging.getLogger(__name__)


class GraphAttention(AttentionBackend, Protocol):
    """An attention backend whose plans can go into the static buffers of a graph."""

    def add_graph(self, num_rows: int, max_pages: int) -> None:
        """Make what a graph of `num_rows` rows needs, with `max_pages` pages in all."""

    def plan_graph(self, batch: Batch) -> None:
        """Like `plan`, for the next capture or replay of the graph with this batch's number of rows."""


@dataclass(frozen=True)
class GraphParts:
    """What a captured step runs through; none of it may be replaced while its graphs are in use."""

    decoder: Decoder
    tables: SlotTables
    pool: KVPool
    attention: GraphAttention


class Inputs:
    """The static inputs of a graph of `size` rows, in one buffer: a single copy brings a step to the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self._host = np.zeros(24 * size, np.uint8)
        self._device = torch.zeros(24 * size, dtype=torch.uint8, device=device)
        cuts = np.cumsum([8, 4, 4, 4, 4])[:-1] * size  # keys first: they want 8-byte alignment
        types = (np.int64, np.float32, np.int32, np.int32, np.int32)
        self._parts = [part.view(t) for part, t in zip(np.split(self._host, cuts), types, strict=True)]
        torch_types = (torch.int64, torch.float32, torch.int32, torch.int32, torch.int32)
        parts = self._device.tensor_split(cuts.tolist())
        self.keys, self.temperature, self.slots, self.positions, self.kv_slots = (
            part.view(t) for part, t in zip(parts, torch_types, strict=True)
        )

    def fill(self, host: HostBatch, temperature: np.ndarray, keys: np.ndarray, spare_slot: int) -> None:
        """Rows beyond the step's own belong to the spare slot, are greedy, and store no keys."""
        n = len(host.slots)
        for part, values, rest in zip(
            self._parts,
            (keys, temperature, host.slots, host.positions, host.kv_slots),
            (0, 0, spare_slot, 0, -1),
            strict=True,
        ):
            part[:n], part[n:] = values, rest
        self._device.copy_(torch.from_numpy(self._host), non_blocking=True)


@dataclass(frozen=True)
class Captured:
    """A graph and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    logits: Tensor  # [size, V] float32
    chosen: Tensor  # [size] int64


class DecodeGraphs:
    """The graphs of one rank for up to `max_rows` rows: a step from the slots' last tokens to their next ones."""

    def __init__(self, parts: GraphParts, max_rows: int, *, show_progress: bool) -> None:
        self.max_rows = max_rows
        self._parts = parts
        self._captured: dict[int, Captured] = {}
        self._sizes = graph_sizes(max_rows)
        self._capture(show_progress)

    def run(self, host: HostBatch, temperature: np.ndarray, keys: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits [B, V] and the tokens [B] that `ops.race` draws from them, which are already in the token table.

        Both are overwritten by the next run of the same padded size.
        """
        rows = len(host.slots)
        captured = self._captured[next(s for s in self._sizes if s >= rows)]
        self._parts.attention.plan_graph(self._stage(captured.inputs, host, temperature, keys))
        captured.graph.replay()
        return captured.logits[:rows], captured.chosen[:rows]

    def _capture(self, show_progress: bool) -> None:
        """The largest first: the smaller ones then fit into its memory."""
        started, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        tables = self._parts.tables
        nothing, memory = np.zeros(0), None
        for size in tqdm(self._sizes[::-1], desc="capture CUDA graphs", unit="graph", disable=not show_progress):
            self._parts.attention.add_graph(size, size * tables.pages.shape[1])
            inputs = Inputs(size, tables.tokens.device)
            batch = self._stage(inputs, _no_rows(), nothing, nothing)
            self._parts.attention.plan_graph(batch)
            self._step(inputs, batch)  # outside of the graph first: kernels load and workspaces grow
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                logits, chosen = self._step(inputs, batch)
            memory = memory or graph.pool()
            self._captured[size] = Captured(graph, inputs, logits, chosen)
        used = (before - torch.cuda.mem_get_info()[0]) / 2**30
        log.info("%d CUDA graphs: %.2f GiB in %.1f s", len(self._sizes), used, time.perf_counter() - started)

    def _step(self, inputs: Inputs, batch: Batch) -> tuple[Tensor, Tensor]:
        parts = self._parts
        looked_up = parts.tables.lookup(inputs.slots, inputs.positions, inputs.kv_slots, batch)
        logits = parts.decoder.logits(parts.decoder.forward(looked_up, parts.pool, parts.attention))
        chosen = ops.race(logits, inputs.temperature, inputs.keys)
        parts.tables.append(inputs.slots.long(), inputs.positions.long() + 1, chosen)
        return logits, chosen

    def _stage(self, inputs: Inputs, host: HostBatch, temperature: np.ndarray, keys: np.ndarray) -> Batch:
        """Bring the inputs to the device; the batch padded to their size, whose extra rows read one key of page 0."""
        n = len(host.slots)
        inputs.fill(host, temperature, keys, self._parts.tables.spare_slot)
        lengths, pages = np.ones(inputs.size, np.int32), np.zeros((inputs.size, host.page_table.shape[1]), np.int32)
        lengths[:n], pages[:n] = host.kv_lengths, host.page_table
        return Batch(
            token_ids=inputs.slots,  # looked up inside the graph
            positions=inputs.positions,
            kv_slots=inputs.kv_slots,
            page_table=pages,
            query_starts=np.arange(inputs.size + 1, dtype=np.int32),
            kv_lengths=lengths,
        )


def graph_sizes(max_rows: int) -> list[int]:
    """The numbers of rows to capture: 1, 2, 4, then every 8 up to 128, then every 16."""
    sizes = [1, 2, 4, *range(8, 129, 8), *range(144, max_rows, 16)]
    return [*(s for s in sizes if s < max_rows), max_rows]


def _no_rows() -> HostBatch:
    none = np.zeros(0, np.int32)
    return HostBatch(
        slots=none,
        positions=none,
        kv_slots=none,
        page_table=np.zeros((0, 1), np.int32),
        query_starts=none,
        kv_lengths=none,
    )
