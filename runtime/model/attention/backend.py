"""The protocol of attention backends, and their common parts.

Shapes: T tokens, H query heads and Hkv key heads of this rank, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.arguments import KVCache, QKNorm, Rope
from ..batch import Batch

HEAD_DIMS = (64, 128)  # of our decode kernel; FlashInfer also has 256
MAX_GROUP = 8  # query heads per key head for which our decode kernel has room
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Heads:
    """The norm and the rotation of a layer's heads of q and k before attention."""

    norm: QKNorm
    cos_sin: Tensor  # [P, E] float32


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One rank's heads and pages, for which a backend is made."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


class AttentionBackend(Protocol):
    """Causal attention of a batch over its pages; made for one scale, number of heads and head size."""

    capturable: bool  # a decode step can be captured in a CUDA graph

    def plan(self, batch: Batch) -> None:
        """Prepare for the layers of one step. For a decode-only step this launches, and neither copies nor waits."""

    def run(self, qkv: Tensor, heads: Heads, cache: KVCache, window: int | None) -> Tensor:
        """Store keys and values of the batch as planned; return attention of its tokens over all keys of their rows.

        qkv     [T, (H + 2 Hkv) E]  the projection, before norm and rotation
        cache   this layer's pages; updated in place
        window  a query at position p sees the keys p - window < j <= p; None: all j <= p
        Returns [T, H E].
        """


def rotate_and_store(qkv: Tensor, heads: Heads, batch: Batch, cache: KVCache, tokens: slice = slice(None)) -> Tensor:
    """Return the queries [T, H, E] of `tokens`, ready for attention; store their keys and values in the cache."""
    rope = Rope(batch.positions[tokens], heads.cos_sin)
    return ops.rotate_and_store_(qkv[tokens], heads.norm, rope, cache, batch.kv_slots[tokens])
