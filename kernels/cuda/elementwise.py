"""Launches of memory-bound kernels: norm, activation, embedding lookup, and updates of the token and page tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .kernel_launch import MAX_THREADS, c_name, kernel, num_threads, optional, vector_width


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), residual, weight, eps)


def silu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, "silu_and_mul")


def gelu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, "gelu_and_mul")


def _gated(x: Tensor, name: str) -> Tensor:
    size = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], size)
    if out.numel():
        v = vector_width(size, x, out)
        launch = kernel("elementwise.cu", f"{name}<{c_name(x)}, {v}>", early=True)
        launch(*_row_grid(out.numel() // size, size // v), out, x, np.int32(size))
    return out


def _row_grid(rows: int, vectors: int) -> tuple[tuple[int, int], int]:
    """Return the grid and the threads of a block: several blocks share a row if there are few rows."""
    threads = num_threads(vectors)
    return (rows, min(-(-vectors // threads), 32 if rows < 256 else 4)), threads


def multiply_by_sigmoid_(x: Tensor, gate: Tensor) -> Tensor:
    if x.numel():
        rows, size = x.shape
        v = vector_width(size, x, gate, strides=(gate.stride(0),))
        launch = kernel("elementwise.cu", f"multiply_by_sigmoid<{c_name(x)}, {v}>", early=True)
        launch(*_row_grid(rows, size // v), x, gate, np.int64(gate.stride(0)), np.int32(size))
    return x


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    rows, size = weight.shape
    out = weight.new_empty(len(ids), size)
    if out.numel():
        v = vector_width(size, weight, out)
        launch = kernel("elementwise.cu", f"gather_rows<Vec<{c_name(weight)}, {v}>, {c_name(ids)}>")
        vectors = size // v
        threads = num_threads(vectors)
        parts = min(-(-vectors // threads), 4 if len(ids) < 256 else 1)
        launch((len(ids), parts), threads, out, weight, ids, np.int64(first_row), np.int64(rows), np.int32(vectors))
    return out


def sum_squares(x: Tensor, sizes: Sequence[int]) -> Tensor:
    out = torch.empty(len(x), 2, dtype=torch.float32, device=x.device)
    if len(x):
        launch = kernel("elementwise.cu", f"sum_squares<{c_name(x)}>", early=True)
        launch((len(x), 2), MAX_THREADS, out, x, *map(np.int32, (x.shape[1], *sizes)))
    return out


def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    rows, token_ids = len(slots), torch.empty_like(slots)
    if rows:
        tables = tokens, np.int64(tokens.stride(0)), pages, np.int64(pages.stride(0))
        sizes = np.int32(page_size), np.int32(rows)
        launch = kernel("elementwise.cu", "begin_decode")
        launch((-(-rows // MAX_THREADS), 1), MAX_THREADS, token_ids, *tables, slots, positions, kv_slots, *sizes)
    return token_ids


def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, new_tokens: Tensor) -> None:
    if rows := len(slots):
        inputs = tokens, np.int64(tokens.stride(0)), slots, positions, new_tokens
        kernel("elementwise.cu", "append_tokens")((-(-rows // MAX_THREADS), 1), MAX_THREADS, *inputs, np.int32(rows))


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[-1]
    v = vector_width(size, x, weight, out, *([] if residual is None else [residual]))
    threads, vectors = _norm_shape(size, v)
    launch = kernel("elementwise.cu", f"rms_norm<{c_name(x)}, {v}, {vectors}>", early=True)
    launch((x.numel() // size, 1), threads, out, x, optional(residual), weight, np.int32(size), np.float32(eps))
    return out


@functools.cache
def _norm_shape(size: int, v: int) -> tuple[int, int]:
    """Return the threads of a row, and the vectors of v elements that each of them has."""
    threads = num_threads(size // v)
    needed = -(-size // (v * threads))
    vectors = next((n for n in (1, 2, 4, 8, 16) if n >= needed), None)
    if vectors is None:
        raise ValueError(f"rows of {size} elements are too long for the norm; at most {16 * v * threads}")
    return threads, vectors
