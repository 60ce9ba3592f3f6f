"""Attention over pages in plain PyTorch: the path on a CPU and the reference of the tests.

Shapes: B rows, H query heads and Hkv key heads of this rank, E head size, K keys.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels.arguments import KVCache
from ..batch import Batch
from .backend import Heads, rotate_and_store


class TorchAttention:
    """The AttentionBackend; rows of one query are padded to the longest and computed together, others one by one."""

    capturable = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        counts = np.diff(batch.query_starts)
        self._prefills = np.flatnonzero(counts > 1).tolist()
        decode_rows = np.flatnonzero(counts == 1)
        device = batch.positions.device
        self._pages = torch.from_numpy(batch.page_table).to(device)
        self._decode_rows = torch.from_numpy(decode_rows).to(device)
        self._decode_tokens = torch.from_numpy(batch.query_starts[decode_rows]).long().to(device)
        self._decode_lengths = torch.from_numpy(batch.kv_lengths[decode_rows]).long().to(device)
        self._longest_decode = int(batch.kv_lengths[decode_rows].max(initial=0))

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, window: int | None) -> Tensor:
        q = rotate_and_store(qkv, heads, self._batch, cache)
        out = torch.empty_like(q)
        if len(self._decode_rows):
            out[self._decode_tokens] = self._decode(q[self._decode_tokens], cache, window)
        for row in self._prefills:
            start, stop = self._batch.query_starts[row : row + 2].tolist()
            out[start:stop] = self._prefill(row, q[start:stop], cache, window)
        return out.flatten(1)

    def _decode(self, q: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Return attention of one query per decode row, q [B, H, E] -> [B, H, E]."""
        page_size = cache.k.shape[1]
        last = (self._decode_lengths - 1).unsqueeze(1)  # [B, 1]
        num_pages = -(-self._longest_decode // page_size)
        pages = self._pages[self._decode_rows, :num_pages]
        # Beyond a row's length its pages may be any number: read page 0 there, the mask hides it.
        pages = pages.where(torch.arange(num_pages, device=q.device) <= last // page_size, 0)
        keys = torch.arange(num_pages * page_size, device=q.device)
        visible = _visible(last, keys, window)  # [B, K]
        return self._attend(q.unsqueeze(2), cache.k[pages], cache.v[pages], visible[:, None, None]).squeeze(2)

    def _prefill(self, row: int, q: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Return attention of the n last tokens of one row, q [n, H, E] -> [n, H, E]."""
        page_size = cache.k.shape[1]
        length = int(self._batch.kv_lengths[row])
        pages = self._pages[row : row + 1, : -(-length // page_size)]
        positions = torch.arange(length - len(q), length, device=q.device).unsqueeze(1)
        keys = torch.arange(pages.shape[1] * page_size, device=q.device)
        visible = _visible(positions, keys, window)  # [n, K]
        return self._attend(q.transpose(0, 1)[None], cache.k[pages], cache.v[pages], visible)[0].transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Return attention of q [B, H, n, E] over k, v [B, pages, page_size, Hkv, E].

        visible  bool, broadcast to [B, H, n, K]: keys that a query sees
        """
        k, v = (x.flatten(1, 2).transpose(1, 2).to(q.dtype) for x in (k, v))  # [B, Hkv, K, E]
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale, enable_gqa=gqa)


def _visible(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return bool [n, K]: a query at each of `positions` [n, 1] sees each of `keys` [K]."""
    visible = keys <= positions
    return visible if window is None else visible & (keys > positions - window)
