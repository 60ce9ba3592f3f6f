"""Every op in plain torch (NumPy for token ids): the CPU path, the oracle of the tests, and the definition of each op.

`ops.py` has the same functions with the same signatures and checks their arguments; call that one. Shapes: T tokens,
D hidden size, H heads, E head size, I intermediate size, V rows of a vocabulary shard.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd: the increment of SplitMix64


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


def rotate_and_store_(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))  # [T, H + 2 Hkv, E]
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    q, k = _rotate(q.float(), q_norm, eps, positions, cos_sin), _rotate(k.float(), k_norm, eps, positions, cos_sin)
    store_kv_(k.to(qkv.dtype), v, k_cache, v_cache, slots)
    return q.to(qkv.dtype)


def _rotate(x: Tensor, norm: Tensor | None, eps: float, positions: Tensor, cos_sin: Tensor) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, E/2] each
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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


def race(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    if not temperature.any():
        return logits.argmax(-1)
    random = temperature > 0
    scaled = logits / torch.where(random, temperature, 1)[:, None]
    # log(p / E) up to a constant of the row: its argmax is the argmin of E / p.
    drawn = (scaled - _exponential(keys, logits.shape[1]).log()).argmax(-1)
    return torch.where(random, drawn, logits.argmax(-1))


def _exponential(keys: Tensor, size: int) -> Tensor:
    """Exponential noise [S, size] float32; element v of a row is hashed from the row's key and v."""
    bits = _mix(keys[:, None] + GOLDEN * torch.arange(size, device=keys.device))
    uniform = _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return -uniform.log().to(torch.float32)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), elementwise on int64 taken as 64 unsigned bits."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
