"""Attention on a GPU that gives a token the same bits in any batch and chunk: our decode kernel for every token.

A prompt's tokens are decode rows of their own, after the keys of all have been stored, and the keys of a row are
divided by their places alone. That reads the keys once for each token of a prompt, where FlashInfer's prefill reads
them once for many.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.arguments import MAX_CHUNKS, KVCache, Pages, Rope
from ..batch import Batch
from .attention import AttentionShape, Heads, prepare

ROWS = 256  # of one launch: what it needs for partial results grows with them
MIN_CHUNK = 512  # keys


class BatchInvariantAttention:
    """The AttentionBackend; `windows` are those that the model's layers have, `max_length` the longest row's keys."""

    def __init__(self, shape: AttentionShape, scale: float, windows: Collection[int | None], max_length: int) -> None:
        self._kv_heads = shape.num_kv_heads
        self._scale = scale
        self._windows = windows
        self._kv_chunk = max(MIN_CHUNK, -(-max_length // MAX_CHUNKS))

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        tokens = len(batch.positions)
        self._stores_first = batch.num_decoding < batch.num_rows
        self._slices = [slice(first, min(first + ROWS, tokens)) for first in range(0, tokens, ROWS)]
        self._partitions = {
            window: [
                ops.partition_keys(batch.positions[rows], self._kv_heads, window, self._kv_chunk)
                for rows in self._slices
            ]
            for window in self._windows
        }

    def run(self, qkv: Tensor, heads: Heads, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        batch = self._batch
        if self._stores_first:
            prepare(qkv, heads, batch, k_cache, v_cache)
        outputs = [
            ops.decode_attention(
                qkv[rows],
                heads.norm,
                Rope(batch.positions[rows], heads.cos_sin),
                KVCache(k_cache, v_cache),
                batch.kv_slots[rows],
                Pages(batch.pages, batch.owners[rows]),
                partition,
                self._scale,
            )
            for rows, partition in zip(self._slices, self._partitions[window], strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
