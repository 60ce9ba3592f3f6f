"""Attention on a GPU that gives a token the same bits in any batch and chunk: our decode kernel for every token.

A prompt's tokens are decode rows of their own, after the keys of all have been stored, and the keys of a row are
divided by their places alone. That reads the keys once for each token of a prompt, where FlashInfer's prefill reads
them once for many.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ....kernels import ops, reference
from ..batch import Batch
from .attention import AttentionShape, Heads, prepare

ROWS = 256  # of one launch: what it needs for partial results grows with them
LEAST_PART = 512  # keys


class BatchInvariantAttention:
    """The AttentionBackend; `windows` are those that the model's layers have, `max_length` the longest row's keys."""

    def __init__(self, shape: AttentionShape, scale: float, windows: Collection[int | None], max_length: int) -> None:
        self._kv_heads = shape.num_kv_heads
        self._scale = scale
        self._windows = windows
        self._part = max(LEAST_PART, -(-max_length // reference.PARTS))

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        tokens = len(batch.positions)
        self._stores_first = batch.num_decoding < batch.num_rows
        self._slices = [slice(first, min(first + ROWS, tokens)) for first in range(0, tokens, ROWS)]
        self._splits = {
            window: [ops.split_keys(batch.positions[s], self._kv_heads, window, self._part) for s in self._slices]
            for window in self._windows
        }

    def run(self, qkv: Tensor, heads: Heads, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        batch = self._batch
        if self._stores_first:
            prepare(qkv, heads, batch, k_cache, v_cache)
        norms = heads.q_norm, heads.k_norm, heads.eps
        parts = []
        for rows, splits in zip(self._slices, self._splits[window], strict=True):
            inputs = qkv[rows], *norms, batch.positions[rows], heads.cos_sin, k_cache, v_cache, batch.kv_slots[rows]
            where = batch.pages, batch.owners[rows], splits
            parts.append(ops.decode_attention(*inputs, *where, self._scale, window, self._part))
        return torch.cat(parts) if len(parts) > 1 else parts[0]
