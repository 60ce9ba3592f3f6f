"""Every op in plain torch (NumPy for token ids): the CPU path, the oracle of the tests, and the definition of each op.

`ops.py` has the same functions with the same signatures and checks their arguments; call that one. Shapes: T tokens,
D hidden size, H heads, E head size, I intermediate size, V rows of a vocabulary shard.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    local = ids - first_row
    owned = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(torch.where(owned, local, 0), weight)
    return rows * owned.unsqueeze(-1).to(rows.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    total = x.float() + residual.float()
    residual.copy_(total)
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * scale * weight.float()).to(x.dtype)


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, E/2] each
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def store_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if (slots < 0).any():
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    page_size = k_cache.shape[1]
    where = (slots.long() // page_size, slots.long() % page_size)
    k_cache.index_put_(where, k.to(k_cache.dtype))
    v_cache.index_put_(where, v.to(v_cache.dtype))


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
