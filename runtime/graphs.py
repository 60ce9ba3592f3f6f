"""Decode steps as CUDA graphs: captured once for each padded number of rows, replayed with other inputs.

A launch from Python costs more than many a decode kernel runs; a graph launches a whole step at once. Inputs lie in
static buffers; rows beyond the step's own have no slot for their keys, and nobody looks at their logits.
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


class DecodeGraphs:
    """The graphs of one rank for up to `max_rows` rows."""

    def __init__(self, parts: GraphParts, max_rows: int, *, show_progress: bool) -> None:
        self.max_rows = max_rows
        self._parts = parts
        device = parts.tables.tokens.device
        # slots, positions, kv_slots of each row: one copy brings a step's inputs to the device.
        self._inputs = torch.zeros(3, max_rows, dtype=torch.int32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, Tensor] = {}
        self._sizes = graph_sizes(max_rows)
        self._capture(show_progress)

    def run(self, host: HostBatch) -> Tensor:
        """Logits [B, V] of a decode step; overwritten by the next run of the same padded size."""
        rows = len(host.slots)
        size = next(s for s in self._sizes if s >= rows)
        self._parts.attention.plan_graph(self._stage(size, host))
        self._graphs[size].replay()
        return self._logits[size][:rows]

    def _capture(self, show_progress: bool) -> None:
        """The largest first: the smaller ones then fit into its memory."""
        started, before = time.perf_counter(), torch.cuda.mem_get_info()[0]
        max_pages = self._parts.tables.pages.shape[1]
        memory = None
        for size in tqdm(self._sizes[::-1], desc="capture CUDA graphs", unit="graph", disable=not show_progress):
            self._parts.attention.add_graph(size, size * max_pages)
            batch = self._stage(size, _no_rows())
            self._parts.attention.plan_graph(batch)
            self._step(batch)  # outside of the graph first: kernels load and workspaces grow
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._logits[size] = self._step(batch)
            memory = memory or graph.pool()
            self._graphs[size] = graph
        used = (before - torch.cuda.mem_get_info()[0]) / 2**30
        log.info("%d CUDA graphs: %.2f GiB in %.1f s", len(self._sizes), used, time.perf_counter() - started)

    def _step(self, batch: Batch) -> Tensor:
        slots, positions, kv_slots = self._inputs[:, : batch.num_rows].unbind(0)
        looked_up = self._parts.tables.lookup(slots, positions, kv_slots, batch)
        hidden = self._parts.decoder.forward(looked_up, self._parts.pool, self._parts.attention)
        return self._parts.decoder.logits(hidden)

    def _stage(self, size: int, host: HostBatch) -> Batch:
        """Bring the inputs to the device, padded to `size` rows, which read one key of page 0 and store none."""
        n = len(host.slots)
        inputs = np.zeros((3, size), np.int32)
        inputs[:, :n] = host.slots, host.positions, host.kv_slots
        inputs[2, n:] = -1
        self._inputs[:, :size].copy_(torch.from_numpy(inputs), non_blocking=True)
        lengths, pages = np.ones(size, np.int32), np.zeros((size, host.page_table.shape[1]), np.int32)
        lengths[:n], pages[:n] = host.kv_lengths, host.page_table
        slots, positions, kv_slots = self._inputs[:, :size].unbind(0)
        return Batch(
            token_ids=slots,  # looked up inside the graph
            positions=positions,
            kv_slots=kv_slots,
            page_table=pages,
            query_starts=np.arange(size + 1, dtype=np.int32),
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
