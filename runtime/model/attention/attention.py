"""The attention layer, the protocol of what computes attention over pages, and its definition in plain torch.

Shapes: T tokens, H query heads and Hkv key heads of this rank, E head size, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....comm.base import Communicator
from ....kernels import ops
from ....kernels.arguments import KVCache, QKNorm, Rope
from ..batch import Batch
from ..linear import ColumnLinear, Projection, RowLinear, share
from ..model_config import ModelConfig
from ..norm import Normed, Residual, norm_weight
from ..weights import Weights

HEAD_DIMS = (64, 128)  # of our decode kernel; FlashInfer has 256, too
MAX_GROUP = 8  # query heads of a key head, that our decode kernel has room for
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Heads:
    """The norm and the rotation of a layer's heads of q and k before attention."""

    norm: QKNorm
    cos_sin: Tensor  # [P, E] float32


class AttentionBackend(Protocol):
    """Causal attention of a batch over its pages; made for one scale, number of heads and head size."""

    def plan(self, batch: Batch) -> None:
        """Prepare for the layers of one step. For one that only decodes this launches, and neither copies nor waits."""

    def run(self, qkv: Tensor, heads: Heads, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        """Store keys and values of the batch as planned; attention of its tokens over all keys of their rows.

        qkv               [T, (H + 2 Hkv) E]  as it was projected
        k_cache, v_cache  [pages, page_size, Hkv, E], any strides; updated in place
        window            a query at position p sees the keys p - window < j <= p; None: all j <= p
        Returns [T, H E].
        """


class Attention:
    """QKV, optional norm of queries and keys, rotary positions, attention over the pages, output projection."""

    def __init__(self, weights: Weights, comm: Communicator, config: ModelConfig, layer: int, name: str) -> None:
        self.layer = layer
        self.window = config.window(layer)
        q_features = config.num_heads * config.head_dim
        kv_features = config.num_kv_heads * config.head_dim
        kv_heads = config.kv_heads_of_rank(comm.rank, comm.size)
        kv_rows = slice(kv_heads.start * config.head_dim, kv_heads.stop * config.head_dim)
        projections = [
            Projection(f"{name}.q_proj", q_features, share(q_features, comm)),
            Projection(f"{name}.k_proj", kv_features, kv_rows),
            Projection(f"{name}.v_proj", kv_features, kv_rows),
        ]
        self.qkv = ColumnLinear(weights, projections, config.hidden_size, bias=config.qkv_bias)
        self.output = RowLinear(
            weights, comm, f"{name}.o_proj", config.hidden_size, q_features, bias=config.output_bias
        )
        q_norm, k_norm = (
            norm_weight(weights, f"{name}.{x}_norm.weight", config.head_dim) if config.qk_norm else None for x in "qk"
        )
        self.norm = QKNorm(q_norm, k_norm, config.norm_eps)

    def __call__(
        self,
        normed: Normed,
        residual: Residual,
        batch: Batch,
        cos_sin: Tensor,
        cache: tuple[Tensor, Tensor],
        backend: AttentionBackend,
    ) -> None:
        """Rows [T, D]; the result is added to `residual`. Keys and values go into `cache`, this layer's (K, V)."""
        heads = Heads(self.norm, cos_sin)
        self.output(backend.run(self.qkv(normed), heads, *cache, self.window), residual)


def prepare(
    qkv: Tensor, heads: Heads, batch: Batch, k_cache: Tensor, v_cache: Tensor, tokens: slice = slice(None)
) -> Tensor:
    """The queries [T, H, E] of `tokens`, ready for attention; their keys and values go into the cache."""
    rope, cache = Rope(batch.positions[tokens], heads.cos_sin), KVCache(k_cache, v_cache)
    return ops.rotate_and_store_(qkv[tokens], heads.norm, rope, cache, batch.kv_slots[tokens])


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What a backend is made for: one rank's heads, and the pages."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


def why_not(shape: AttentionShape) -> str | None:
    """The reason why this shape cannot be served, or None."""
    if shape.dtype not in DTYPES:
        return f"there are no kernels for {str(shape.dtype).removeprefix('torch.')}"
    if shape.head_dim not in HEAD_DIMS:
        return f"there are no kernels for head_dim {shape.head_dim}"
    if shape.num_heads > MAX_GROUP * shape.num_kv_heads:
        return f"{shape.num_heads} query heads on {shape.num_kv_heads} key heads are more than {MAX_GROUP} on each"
    return None


class TorchAttention:
    """The definition of attention over pages: the path on a CPU and the oracle of the tests.

    Rows with one query (decode) are padded to the longest and computed together, the others one by one.
    """

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

    def run(self, qkv: Tensor, heads: Heads, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        q = prepare(qkv, heads, self._batch, k_cache, v_cache)
        out = torch.empty_like(q)
        if len(self._decode_rows):
            out[self._decode_tokens] = self._decode(q[self._decode_tokens], k_cache, v_cache, window)
        for row in self._prefills:
            start, stop = self._batch.query_starts[row : row + 2].tolist()
            out[start:stop] = self._prefill(row, q[start:stop], k_cache, v_cache, window)
        return out.flatten(1)

    def _decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        """One query for each decode row: q [B, H, E] -> [B, H, E]."""
        page_size = k_cache.shape[1]
        last = (self._decode_lengths - 1).unsqueeze(1)  # [B, 1]
        num_pages = -(-self._longest_decode // page_size)
        pages = self._pages[self._decode_rows, :num_pages]
        # Beyond a row's length its pages may be any number: read page 0 there, the mask hides it.
        pages = pages.where(torch.arange(num_pages, device=q.device) <= last // page_size, 0)
        keys = torch.arange(num_pages * page_size, device=q.device)
        seen = _seen(last, keys, window)  # [B, K]
        return self._attend(q.unsqueeze(2), k_cache[pages], v_cache[pages], seen[:, None, None]).squeeze(2)

    def _prefill(self, row: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: int | None) -> Tensor:
        """The n last tokens of one row: q [n, H, E] -> [n, H, E]."""
        page_size = k_cache.shape[1]
        length = int(self._batch.kv_lengths[row])
        pages = self._pages[row : row + 1, : -(-length // page_size)]
        positions = torch.arange(length - len(q), length, device=q.device).unsqueeze(1)
        keys = torch.arange(pages.shape[1] * page_size, device=q.device)
        seen = _seen(positions, keys, window)  # [n, K]
        return self._attend(q.transpose(0, 1)[None], k_cache[pages], v_cache[pages], seen)[0].transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """q [B, H, n, E] over k, v [B, pages, page_size, Hkv, E], where `seen` (broadcast to [B, H, n, K])."""
        k, v = (x.flatten(1, 2).transpose(1, 2).to(q.dtype) for x in (k, v))  # [B, Hkv, K, E]
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=gqa)


def _seen(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query at each of `positions` [n, 1] sees each of `keys` [K]: bool [n, K]."""
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)
