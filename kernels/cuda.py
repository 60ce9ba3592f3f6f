"""The CUDA kernels behind `ops.py`: compiled by NVRTC through CuPy on first use, launched on torch's current stream.

The one module that imports CuPy. Arguments have been checked by `ops.py`; here shapes become grids. Sources include
common.cuh; they are joined into one text before compilation, because CuPy's cache does not look into included files.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import cupy
import numpy as np
import torch
from torch import Tensor

from .jit import SOURCES, CompileError

C_NAMES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int32: "int",
    torch.int64: "long long",
}
THREADS = 256  # at most, for all kernels: their __launch_bounds__
VECTOR_BYTES = 16
RACE_BLOCKS = 1024  # enough to fill any GPU


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    rows, size = weight.shape
    out = weight.new_empty(len(ids), size)
    if out.numel():
        v = _vector(size, weight, out)
        kernel = _kernel("index.cu", f"gather_rows<Vec<{_c(weight)}, {v}>, {_c(ids)}>")
        chunks = size // v
        threads = _threads(chunks)
        parts = min(-(-chunks // threads), 4 if len(ids) < 256 else 1)
        kernel((len(ids), parts), threads, out, weight, ids, np.int64(first_row), np.int64(rows), np.int32(chunks))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x.contiguous(), residual, weight, eps)


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
    tokens, (pages, page_size, kv_heads, head_dim) = len(qkv), k_cache.shape
    heads = qkv.shape[1] // head_dim
    q = qkv.new_empty(tokens, heads - 2 * kv_heads, head_dim)
    if tokens == 0:
        return q
    pairs = next((n for n in (1, 2, 4, 8) if 64 * n >= head_dim), None)
    if pairs is None:
        raise ValueError(f"heads of {head_dim} elements are too long to rotate; at most 512")
    kernel = _kernel("attention.cu", f"rotate_and_store<{_c(qkv)}, {_c(k_cache)}, {pairs}>")
    norms = (np.int64(0) if norm is None else norm for norm in (q_norm, k_norm))
    tables = positions.int(), cos_sin, np.int32(len(cos_sin))
    caches = k_cache, v_cache, np.int64(k_cache.stride(0)), np.int64(k_cache.stride(1))
    where = slots.int(), np.int32(page_size), np.int32(pages * page_size)
    shape = np.int32(tokens), np.int32(heads), np.int32(kv_heads), np.int32(head_dim)
    warps = tokens * heads
    kernel((-(-warps // 4), 1), 128, q, qkv, *norms, np.float32(eps), *tables, *caches, *where, *shape)
    return q


def silu_and_mul(x: Tensor) -> Tensor:
    size = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], size)
    if out.numel():
        v = _vector(size, x, out)
        rows, threads = out.numel() // size, _threads(size // v)
        parts = min(-(-size // (v * threads)), 32 if rows < 256 else 4)
        _kernel("elementwise.cu", f"silu_and_mul<{_c(x)}, {v}>")((rows, parts), threads, out, x, np.int32(size))
    return out


def store_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    tokens, width = len(k), k.shape[1] * k.shape[2]
    if tokens == 0:
        return
    pages, page_size = k_cache.shape[:2]
    strides = [k.stride(0), v.stride(0), k_cache.stride(0), k_cache.stride(1)]
    vector = _vector(width, k, v, k_cache, v_cache, strides=strides)
    kernel = _kernel("store.cu", f"store_kv<{_c(k)}, {_c(k_cache)}, {vector}>")
    k_stride, v_stride, page_stride, slot_stride = map(np.int64, strides)
    shape = np.int32(page_size), np.int32(pages * page_size), np.int32(width)
    grid, threads = (tokens, 2), _threads(width // vector)
    kernel(grid, threads, k, v, k_stride, v_stride, k_cache, v_cache, page_stride, slot_stride, slots.int(), *shape)


def race(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    rows, vocab = logits.shape
    best = keys.new_full((rows,), torch.iinfo(torch.int64).min)
    if logits.numel():
        parts = max(1, min(RACE_BLOCKS // rows, vocab // (4 * THREADS)))
        row_stride = np.int64(logits.stride(0))
        kernel = _kernel("sample.cu", "race")
        kernel((rows, parts), THREADS, best, logits, row_stride, temperature, keys, np.int32(vocab))
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    size = x.shape[-1]
    v = _vector(size, x, weight, out, *([] if residual is None else [residual]))
    threads = _threads(size // v)
    needed = -(-size // (v * threads))
    registers = next((n for n in (1, 2, 4, 8, 16) if n >= needed), None)
    if registers is None:
        raise ValueError(f"rows of {size} elements are too long for the norm; at most {16 * v * threads}")
    kernel = _kernel("elementwise.cu", f"rms_norm<{_c(x)}, {v}, {registers}>")
    base = np.int64(0) if residual is None else residual
    kernel((x.numel() // size, 1), threads, out, x, base, weight, np.int32(size), np.float32(eps))
    return out


def _c(tensor: Tensor) -> str:
    return C_NAMES[tensor.dtype]


def _threads(items: int) -> int:
    """Threads of a block with this many items to do: whole warps, at most THREADS."""
    return min(THREADS, -(-items // 32) * 32)


def _vector(size: int, *tensors: Tensor, strides: list[int] | None = None) -> int:
    """Elements that all of these can move at once: as many as 16 bytes hold, or one where that does not divide."""
    v = VECTOR_BYTES // max(t.element_size() for t in tensors)
    aligned = all(t.data_ptr() % (v * t.element_size()) == 0 for t in tensors)
    return v if aligned and size % v == 0 and all(s % v == 0 for s in strides or []) else 1


class _Stream:
    """A raw stream as CuPy's launch wants it."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


@functools.cache
def _kernel(source: str, name: str) -> Any:
    """One instance of a kernel template; call it with grid, threads and arguments (tensors or NumPy scalars)."""
    try:
        function = _module(source, name).get_function(name)
    except cupy.cuda.compiler.CompileException as error:
        raise CompileError(f"NVRTC failed on {source}, {name}:\n{error}") from error

    def launch(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        stream = _Stream(torch.cuda.current_stream().cuda_stream)
        passed = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        function(grid, (threads,), passed, stream=stream)

    return launch


def _module(source: str, name: str) -> Any:
    templates = (name,) if "<" in name else None
    return cupy.RawModule(code=source_text(source), options=("-std=c++17",), name_expressions=templates)


def source_text(name: str) -> str:
    """A source with the headers of this folder in place of their includes."""
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda m: (SOURCES / m[1]).read_text(), (SOURCES / name).read_text())
