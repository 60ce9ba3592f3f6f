"""Attention by FlashInfer: paged decode and paged prefill. The one module that imports it (5 s).

A step that only decodes runs the decode kernels, split over the keys; any other runs all rows through the prefill
kernels. A plan is made on the host once a step and serves all layers with the same window.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import flashinfer
import numpy as np
import torch
from torch import Tensor

from ..batch import Batch

WORKSPACE_BYTES = 128 * 2**20  # FlashInfer's own recommendation; partial results of split keys live there
TENSOR_CORE_GROUP = 4  # query heads per key head from which tensor cores are faster: 264 us against 365 at 4 (H200)
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What a backend is made for: one rank's heads, and the pages."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


def why_not(shape: AttentionShape) -> str | None:
    """The reason why FlashInfer cannot serve this shape, or None."""
    if shape.dtype not in DTYPES:
        return f"FlashInfer has no {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim not in HEAD_DIMS:
        return f"FlashInfer has no head_dim {shape.head_dim}"
    return None


@dataclass(frozen=True)
class Pages:
    """The pages of a batch as FlashInfer wants them: lengths on the host, where it plans, numbers on the device."""

    starts: Tensor  # [B + 1] int32, host: row b has numbers[starts[b]:starts[b + 1]]
    numbers: Tensor  # int32, device
    last_lengths: Tensor  # [B] int32, host: tokens in the last page of each row

    @classmethod
    def of(cls, batch: Batch, page_size: int) -> Pages:
        counts = -(-batch.kv_lengths // page_size)
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        used = np.arange(batch.page_table.shape[1]) < counts[:, None]
        numbers = torch.from_numpy(batch.page_table[used]).to(batch.positions.device)
        last = batch.kv_lengths - (counts - 1) * page_size
        return cls(torch.from_numpy(starts), numbers, torch.from_numpy(last.astype(np.int32)))


class FlashInferAttention:
    """The AttentionBackend; `windows` are those that the model's layers have."""

    def __init__(
        self, shape: AttentionShape, scale: float, windows: Collection[int | None], device: torch.device
    ) -> None:
        self.shape = shape
        self._scale = scale
        self._tensor_cores = shape.num_heads // shape.num_kv_heads >= TENSOR_CORE_GROUP
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._device = device
        # FA3 where its kernels win: a head size of 128 (584 us against 904 for 2 x 4096 tokens on an H200).
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        backend = "fa3" if hopper and shape.head_dim == 128 else "fa2"
        self._prefill = {
            w: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, backend=backend) for w in windows
        }
        self._eager_decode = {w: self._decode_wrapper() for w in windows}
        self._graph_decode: dict[int, dict[int | None, Any]] = {}
        self._graph_pages: Tensor | None = None
        self._active: dict[int | None, Any] = {}
        self._planned = torch.cuda.Event()

    def plan(self, batch: Batch) -> None:
        pages = Pages.of(batch, self.shape.page_size)
        if len(batch.kv_lengths) == batch.query_starts[-1]:
            self._plan_decode(self._eager_decode, pages)
        else:
            self._plan_prefill(batch, pages)

    def plan_graph(self, batch: Batch) -> None:
        """Plan a decode step for the graph of this many rows; the plan goes into the graph's own buffers."""
        self._plan_decode(self._graph_decode[batch.num_rows], Pages.of(batch, self.shape.page_size))

    def add_graph(self, num_rows: int, max_pages: int) -> None:
        """Make the wrappers for graphs of `num_rows` rows, of `max_pages` pages in all."""
        if self._graph_pages is None or len(self._graph_pages) < max_pages:
            self._graph_pages = torch.zeros(max_pages, dtype=torch.int32, device=self._device)
        windows = list(self._eager_decode)
        self._graph_decode[num_rows] = {w: self._decode_wrapper(num_rows) for w in windows}

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        out: Tensor = self._active[window].run(q.contiguous(), (k_cache, v_cache))
        return out

    def _decode_wrapper(self, num_rows: int | None = None) -> Any:
        buffers: dict[str, Any] = {}
        if num_rows is not None:
            buffers = {
                "use_cuda_graph": True,
                "paged_kv_indptr_buffer": torch.zeros(num_rows + 1, dtype=torch.int32, device=self._device),
                "paged_kv_indices_buffer": self._graph_pages,
                "paged_kv_last_page_len_buffer": torch.ones(num_rows, dtype=torch.int32, device=self._device),
            }
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=self._tensor_cores, **buffers
        )

    def _plan_decode(self, wrappers: dict[int | None, Any], pages: Pages) -> None:
        self._planned.synchronize()
        for window, wrapper in wrappers.items():
            wrapper.plan(pages.starts, pages.numbers, pages.last_lengths, *self._heads(), **self._types(window))
        self._use(wrappers)

    def _plan_prefill(self, batch: Batch, pages: Pages) -> None:
        self._planned.synchronize()
        queries = torch.from_numpy(batch.query_starts)
        for window, wrapper in self._prefill.items():
            wrapper.plan(
                queries,
                pages.starts,
                pages.numbers,
                pages.last_lengths,
                *self._heads(),
                causal=True,
                **self._types(window),
            )
        self._use(self._prefill)

    def _use(self, wrappers: dict[int | None, Any]) -> None:
        # A plan is copied from one pinned buffer per wrapper: the next plan must not overwrite it before.
        self._planned.record()
        self._active = wrappers

    def _heads(self) -> tuple[int, int, int, int]:
        s = self.shape
        return s.num_heads, s.num_kv_heads, s.head_dim, s.page_size

    def _types(self, window: int | None) -> dict[str, Any]:
        left = -1 if window is None else window - 1  # FlashInfer does not count the query's own key
        dtype = self.shape.dtype
        return {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": self._scale, "window_left": left}
