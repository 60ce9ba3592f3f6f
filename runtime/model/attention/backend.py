"""The protocol of attention backends, and two of them: plain PyTorch, and batch-invariant on a GPU.

Shapes: B rows, T tokens, H query heads and Hkv KV heads of this rank, E head size, K keys.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import ops
from ....kernels.arguments import MAX_CHUNKS, KVCache, Matrix, Pages, QKNorm, Rope, Rows, num_groups
from ..batch import Batch
from ..kv_pool import AttentionShape

HEAD_DIMS = (64, 96, 128, 256)  # of our decode kernel; those of FlashInfer, and 96, which is padded for it
DTYPES = (torch.bfloat16, torch.float16)
MAX_ROWS = 256  # rows of one launch: the memory for partial results grows with them
MIN_CHUNK = 512  # least number of keys in a chunk


@dataclass(frozen=True)
class Heads:
    """A layer's heads: the norm and the rotation of q and k before attention, the keys that they see, and its result.

    window  a query at position p sees the keys p - window < j <= p; None: all j <= p
    group   of the layer: its pages are those of this page table
    feeds   the weight of the linear layer that alone takes the result, if there is one
    """

    norm: QKNorm
    cos_sin: Tensor  # [P, E] float32
    sinks: Tensor | None = None  # [H]: logits that take part in the softmax of each query head and add nothing
    window: int | None = None
    group: int = 0
    feeds: Matrix | None = None


class AttentionBackend(Protocol):
    """Causal attention of a batch over its pages; made for one scale, number of heads and head size."""

    capturable: bool  # a decode step can be captured in a CUDA graph
    host_s: float  # time in which a CPU has computed attention; 0 on a GPU, where the host only launches it

    def plan(self, batch: Batch) -> None:
        """Prepare for the layers of one step. For a decode-only step this launches, and neither copies nor waits."""

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Rows:
        """Store keys and values of the batch as planned; return attention of its tokens over all keys of their rows.

        qkv     [T, (H + 2 Hkv) E]  the projection, before norm and rotation
        cache   this layer's pages; updated in place
        out     [T, H E]  receives the result; contiguous
        Returns [T, H E]: `out`, or new memory. Without `out` it may be FP8Rows, if `heads.feeds` takes them.
        """


def rotate_and_store(qkv: Tensor, heads: Heads, batch: Batch, cache: KVCache) -> Tensor:
    """Return the queries [T, H, E] of the batch, ready for attention; store its keys and values in the cache."""
    rope = Rope(batch.positions, heads.cos_sin)
    return ops.rotate_and_store_(qkv, heads.norm, rope, cache, batch.kv_slots[heads.group])


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Return the reason why the GPU backends cannot serve `shape`, or None."""
    if shape.dtype not in DTYPES:
        return f"there are no kernels for {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim not in HEAD_DIMS:
        return f"there are no kernels for head_dim {shape.head_dim}"
    return None


class TorchAttention:
    """The AttentionBackend in plain PyTorch: the path on a CPU and the reference of the tests.

    Rows of one query are padded to the longest and computed together, others one by one.
    """

    capturable = False

    def __init__(self, scale: float, softcap: float | None = None) -> None:
        self.scale, self.softcap, self.host_s = scale, softcap, 0.0

    def plan(self, batch: Batch) -> None:
        self._batch, host = batch, batch.host
        counts = np.diff(host.query_starts)
        self._prefills = np.flatnonzero(counts > 1).tolist()
        decode_rows = np.flatnonzero(counts == 1)
        device = batch.positions.device
        self._page_tables = torch.from_numpy(host.page_table).to(device)
        self._decode_rows = torch.from_numpy(decode_rows).to(device)
        self._decode_tokens = torch.from_numpy(host.query_starts[decode_rows]).long().to(device)
        self._decode_lengths = torch.from_numpy(host.kv_lengths[decode_rows]).long().to(device)
        self._longest_decode = int(host.kv_lengths[decode_rows].max(initial=0))

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Rows:
        started = time.perf_counter()
        q = rotate_and_store(qkv, heads, self._batch, cache)
        self._sinks, self._pages = heads.sinks, self._page_tables[heads.group]
        attended = torch.empty_like(q) if out is None else out.view_as(q)
        if len(self._decode_rows):
            attended[self._decode_tokens] = self._decode(q[self._decode_tokens], cache, heads.window)
        for row in self._prefills:
            start, stop = self._batch.host.query_starts[row : row + 2].tolist()
            attended[start:stop] = self._prefill(row, q[start:stop], cache, heads.window)
        if not qkv.is_cuda:
            self.host_s += time.perf_counter() - started
        return attended.flatten(1)

    def _decode(self, q: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Return attention of one query per decode row, q [B, H, E] -> [B, H, E]."""
        page_size = cache.k.shape[1]
        last = (self._decode_lengths - 1).unsqueeze(1)  # [B, 1]
        num_pages = -(-self._longest_decode // page_size)
        pages = self._pages[self._decode_rows, :num_pages]
        # Entries beyond a row's length may be any number: page 0 is read there, and the mask hides it.
        pages = pages.where(torch.arange(num_pages, device=q.device) <= last // page_size, 0)
        keys = torch.arange(num_pages * page_size, device=q.device)
        visible = _visible(last, keys, window)  # [B, K]
        return self._attend(q.unsqueeze(2), cache.k[pages], cache.v[pages], visible[:, None, None]).squeeze(2)

    def _prefill(self, row: int, q: Tensor, cache: KVCache, window: int | None) -> Tensor:
        """Return attention of the n last tokens of one row, q [n, H, E] -> [n, H, E]."""
        page_size = cache.k.shape[1]
        length = int(self._batch.host.kv_lengths[row])
        pages = self._pages[row : row + 1, : -(-length // page_size)]
        positions = torch.arange(length - len(q), length, device=q.device).unsqueeze(1)
        keys = torch.arange(pages.shape[1] * page_size, device=q.device)
        visible = _visible(positions, keys, window)  # [n, K]
        return self._attend(q.transpose(0, 1)[None], cache.k[pages], cache.v[pages], visible)[0].transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Return attention of q [B, H, n, E] over k, v [B, pages, page_size, Hkv, E] where `visible` [B, H, n, K]."""
        k, v = (x.flatten(1, 2).transpose(1, 2).to(q.dtype) for x in (k, v))  # [B, Hkv, K, E]
        gqa = q.shape[1] != k.shape[1]
        if self.softcap is not None or self._sinks is not None:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = q @ k.transpose(2, 3) * self.scale
            if self.softcap is not None:
                scores = (scores / self.softcap).tanh() * self.softcap
            scores = scores.masked_fill(~visible, -torch.inf)
            if self._sinks is not None:
                sinks = self._sinks[:, None, None].expand(*scores.shape[:3], 1)
                scores = torch.cat((scores, sinks.to(scores.dtype)), dim=-1)
            return scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale, enable_gqa=gqa)


def _visible(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return bool [n, K]: a query at each of `positions` [n, 1] sees each of `keys` [K]."""
    visible = keys <= positions
    return visible if window is None else visible & (keys > positions - window)


class BatchInvariantAttention:
    """The AttentionBackend of --deterministic: the result for a token is bitwise identical in any batch and chunk.

    For layers with one of `windows` and rows of up to `max_length` keys. The decode kernel computes every token: each
    token of a prompt is one decode row, after the keys of all tokens have been stored. The keys of a row are divided
    by their positions alone. They are read once for each token of a prompt, where FlashInfer reads them once for many.
    """

    capturable = True
    host_s = 0.0

    def __init__(
        self,
        shape: AttentionShape,
        scale: float,
        windows: Collection[int | None],
        max_length: int,
        softcap: float | None = None,
    ) -> None:
        self._groups = num_groups(shape.num_heads, shape.num_kv_heads)
        self._scale, self._softcap = scale, softcap
        self._windows = windows
        self._kv_chunk = max(MIN_CHUNK, -(-max_length // MAX_CHUNKS))

    def plan(self, batch: Batch) -> None:
        self._batch = batch
        tokens = len(batch.positions)
        self._stores_first = batch.host.num_decoding < batch.host.num_rows
        self._slices = [slice(first, min(first + MAX_ROWS, tokens)) for first in range(0, tokens, MAX_ROWS)]
        self._partitions = {
            window: [
                ops.partition_keys(
                    batch.positions[rows], batch.page_table_rows[rows], self._groups, window, self._kv_chunk
                )
                for rows in self._slices
            ]
            for window in self._windows
        }

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Rows:
        batch = self._batch
        if out is None:
            out = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * cache.k.shape[2] * cache.k.shape[3])
        if self._stores_first:
            rotate_and_store(qkv, heads, batch, cache)
        all_slots, page_table = batch.kv_slots[heads.group], batch.device_page_table[heads.group]
        for rows, partition in zip(self._slices, self._partitions[heads.window], strict=True):
            q, kv_slots, rope = qkv[rows], all_slots[rows], Rope(batch.positions[rows], heads.cos_sin)
            pages = Pages(page_table, batch.page_table_rows[rows])
            keys = cache, kv_slots, pages, partition
            factors = self._scale, self._softcap, heads.sinks
            ops.decode_attention(q, heads.norm, rope, *keys, *factors, out=out[rows])
        return out
