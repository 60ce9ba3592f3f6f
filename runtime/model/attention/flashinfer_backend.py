"""Attention on a GPU: FlashInfer's paged prefill and our decode kernel. The only module that imports FlashInfer (2 s).

Decoding rows go first, through `ops.decode_attention`, which needs nothing from the host. The other rows go through
FlashInfer's prefill kernels, where a row of one token would take as long as one of 128. Their plan is made on the host
once per step for each window and page table.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....kernels import ops
from ....kernels.arguments import KVCache, Pages, Rope, Rows, num_groups
from ..batch import Batch, to_device
from ..kv_pool import AttentionShape
from .backend import Heads, rotate_and_store
from .deferred_package import import_alone

if TYPE_CHECKING:
    from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

flashinfer_prefill = import_alone("flashinfer", "prefill")
WORKSPACE_BYTES = 128 * 2**20  # FlashInfer's recommendation; holds partial results of split keys


def compile_prefill(
    shape: AttentionShape, windows: Collection[int | None], softcap: float | None, device: torch.device
) -> None:
    """Let FlashInfer compile its kernels for these layers, or load them: plan one token for each kind of window.

    Kernels depend on dtypes, the head size, and on whether there is a window or a softcap. They are compiled by nvcc
    and kept on disk; processes that need the same ones wait for each other.
    """

    def plan(window: int | None) -> None:
        workspace = torch.zeros(2**20, dtype=torch.uint8, device=device)
        zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        ends = torch.cat((zero, one))
        sizes = shape.num_heads, shape.num_kv_heads, shape.stored_head_dim, shape.page_size
        options = _plan_options(shape, window, 1.0, softcap)
        _wrapper(shape, workspace).plan(ends, ends, zero.to(device), one, *sizes, **options)

    kinds = {window is None: window for window in windows}.values()
    with ThreadPoolExecutor(len(kinds)) as threads:
        list(threads.map(plan, kinds))


def _wrapper(shape: AttentionShape, workspace: Tensor) -> BatchPrefillWithPagedKVCacheWrapper:
    # FA3 is faster for a head size of 128 only: 584 us against 904 for 2 x 4096 tokens on an H200. It does not take
    # 16-bit queries with an FP8 cache.
    hopper = torch.cuda.get_device_capability(workspace.device)[0] == 9
    backend = "fa3" if hopper and shape.stored_head_dim == 128 and shape.cache_dtype == shape.dtype else "fa2"
    return flashinfer_prefill.BatchPrefillWithPagedKVCacheWrapper(workspace, backend=backend)


def _plan_options(shape: AttentionShape, window: int | None, scale: float, softcap: float | None) -> dict[str, Any]:
    """Return options of FlashInfer's `plan`."""
    return {
        "causal": True,
        "window_left": -1 if window is None else window - 1,  # FlashInfer does not count the query's key
        "q_data_type": shape.dtype,
        "kv_data_type": shape.cache_dtype,
        "sm_scale": scale,
        "logits_soft_cap": softcap or 0.0,  # 0: none
    }


class FlashInferAttention:
    """The AttentionBackend for layers with one of `windows`, each with the group of layers that have it."""

    capturable = True
    host_s = 0.0

    def __init__(
        self,
        shape: AttentionShape,
        scale: float,
        windows: Collection[tuple[int | None, int]],
        device: torch.device,
        softcap: float | None = None,
    ) -> None:
        self.shape = shape
        self._scale, self._softcap = scale, softcap
        self._groups = num_groups(shape.num_heads, shape.num_kv_heads)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._prefill = {w: _wrapper(shape, workspace) for w in windows}
        self._windows = {window for window, _ in windows}
        self._planned = torch.cuda.Event()

    def plan(self, batch: Batch) -> None:
        n = batch.host.num_decoding
        self._decoding, self._prompts = batch.part(slice(n)), batch.part(slice(n, None))
        self._has_prompts = n < batch.host.num_rows
        rows = self._decoding.positions, self._decoding.page_table_rows
        self._partitions = {w: ops.partition_keys(*rows, self._groups, w) for w in self._windows if n}
        if self._has_prompts:
            self._plan_prefill(batch)

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None = None) -> Rows:
        n = self._decoding.host.num_decoding
        if not self._has_prompts:
            return self._attend_decoding(qkv, heads, cache, out)
        if out is None:
            out = qkv.new_empty(len(qkv), self.shape.num_heads * self.shape.head_dim)
        if n:
            self._attend_decoding(qkv[:n], heads, cache, out[:n])
        q = rotate_and_store(qkv[n:], heads, self._prompts, cache)
        self._attend_prompts(q, heads, cache, out[n:].view_as(q))
        return out

    def _attend_decoding(self, qkv: Tensor, heads: Heads, cache: KVCache, out: Tensor | None) -> Rows:
        """Return attention of the decoding rows [B, H E], which stores their keys and values, too."""
        rows, group = self._decoding, heads.group
        rope, pages = Rope(rows.positions, heads.cos_sin), Pages(rows.device_page_table[group], rows.page_table_rows)
        keys = cache, rows.kv_slots[group], pages, self._partitions[heads.window]
        factors = self._scale, self._softcap, heads.sinks
        return ops.decode_attention(qkv, heads.norm, rope, *keys, *factors, out, heads.feeds)

    def _attend_prompts(self, q: Tensor, heads: Heads, cache: KVCache, out: Tensor) -> None:
        """Write attention of the queries [T, H, E] into `out`; heads of a size that FlashInfer has not are padded."""
        prefill, padding = self._prefill[heads.window, heads.group], self.shape.stored_head_dim - self.shape.head_dim
        sinks = heads.sinks
        if padding == 0 and sinks is None:
            prefill.run(q, tuple(cache), out=out)
            return
        padded = tuple(x.as_strided((*x.shape[:3], self.shape.stored_head_dim), x.stride()) for x in cache)
        attended, lse = prefill.run(
            F.pad(q, (0, padding)), padded, return_lse=True
        )  # lse [T, H]: log2 of sums of 2^score
        if sinks is not None:  # FlashInfer's keys get the part of the softmax that the sinks leave them
            attended = attended * torch.sigmoid(lse * math.log(2) - sinks).unsqueeze(-1)
        out.copy_(attended[..., : self.shape.head_dim])

    def _plan_prefill(self, batch: Batch) -> None:
        shape, host = self.shape, batch.host
        rows = slice(host.num_decoding, None)
        kv_lengths, query_starts = host.kv_lengths[rows], host.query_starts[rows] - host.num_decoding
        counts = -(-kv_lengths // shape.page_size)
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        used = np.arange(host.page_table.shape[2]) < counts[:, None]
        pages = to_device(host.page_table[:, rows][:, used], batch.positions.device)
        last_lengths = (kv_lengths - (counts - 1) * shape.page_size).astype(np.int32)
        queries, indptr, last = (torch.from_numpy(a) for a in (query_starts, starts, last_lengths))
        heads = shape.num_heads, shape.num_kv_heads, shape.stored_head_dim, shape.page_size
        self._planned.synchronize()  # wait for the copy of the last plan: all plans use one pinned buffer
        for (window, group), wrapper in self._prefill.items():
            options = _plan_options(shape, window, self._scale, self._softcap)
            wrapper.plan(queries, indptr, pages[group], last, *heads, **options)
        self._planned.record()
