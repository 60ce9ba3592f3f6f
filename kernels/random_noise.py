"""The random numbers of Gumbel-max sampling: a hash of a row's key and a token, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd: the increment of SplitMix64


def exponential_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Return exponential noise [S, V] float32, hashed from the row's key and the token; ids [V] or [S, V]."""
    bits = _mix(keys[:, None] + GOLDEN * ids.long())
    uniform = _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return -uniform.log().to(torch.float32)


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood, 2014) to int64, taken as 64 unsigned bits."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)
