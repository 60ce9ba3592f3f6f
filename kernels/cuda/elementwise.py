"""Norm and activation of rows of hidden states."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kernel_launch import c_name, kernel, num_threads, optional, vector_width


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], size)
    if out.numel():
        v = vector_width(size, x, out)
        rows, threads = out.numel() // size, num_threads(size // v)
        parts = min(-(-size // (v * threads)), 32 if rows < 256 else 4)
        launch = kernel("elementwise.cu", f"silu_and_mul<{c_name(x)}, {v}>", early=True)
        launch((rows, parts), threads, out, x, np.int32(size))
    return out


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[-1]
    v = vector_width(size, x, weight, out, *([] if residual is None else [residual]))
    threads = num_threads(size // v)
    needed = -(-size // (v * threads))
    vectors = next((n for n in (1, 2, 4, 8, 16) if n >= needed), None)
    if vectors is None:
        raise ValueError(f"rows of {size} elements are too long for the norm; at most {16 * v * threads}")
    launch = kernel("elementwise.cu", f"rms_norm<{c_name(x)}, {v}, {vectors}>", early=True)
    launch((x.numel() // size, 1), threads, out, x, optional(residual), weight, np.int32(size), np.float32(eps))
    return out
