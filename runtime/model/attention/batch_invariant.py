"""Batch-invariant attention on a GPU: a token's result is bitwise identical in any batch and chunk.

The decode kernel computes every token: each token of a prompt is one decode row, after the keys of all tokens have
been stored. The keys of a row are divided by their positions alone. They are read once for each token of a prompt,
where FlashInfer's prefill reads them once for many.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.arguments import MAX_CHUNKS, KVCache, Pages, Rope
from ..batch import Batch
from .backend import AttentionShape, Heads, rotate_and_store

MAX_ROWS = 256  # per launch: the memory for partial results grows with them
MIN_CHUNK = 512  # keys


class BatchInvariantAttention:
    """The AttentionBackend for layers with one of `windows` and rows of up to `max_length` keys."""

    capturable = True

    def __init__(self, shape: AttentionShape, scale: float, windows: Collection[int | None], max_length: int) -> None:
        self._kv_heads = shape.num_kv_heads
        self._scale = scale
        self._windows = windows
        self._kv_chunk = max(MIN_CHUNK, -(-max_length // MAX_CHUNKS))

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        tokens = len(batch.positions)
        self._stores_first = batch.num_decoding < batch.num_rows
        self._slices = [slice(first, min(first + MAX_ROWS, tokens)) for first in range(0, tokens, MAX_ROWS)]
        self._partitions = {
            window: [
                ops.partition_keys(batch.positions[rows], self._kv_heads, window, self._kv_chunk)
                for rows in self._slices
            ]
            for window in self._windows
        }

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, window: int | None) -> Tensor:
        batch = self._batch
        if self._stores_first:
            rotate_and_store(qkv, heads, batch, cache)
        outputs = [
            ops.decode_attention(
                qkv[rows],
                heads.norm,
                Rope(batch.positions[rows], heads.cos_sin),
                cache,
                batch.kv_slots[rows],
                Pages(batch.pages, batch.owners[rows]),
                partition,
                self._scale,
            )
            for rows, partition in zip(self._slices, self._partitions[window], strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
