"""Linear layers: a kernel that streams the weight for few rows, cuBLAS for many, and a batch-invariant GEMM."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import rms_norm, silu_and_mul
from .experts import tiled_gemm
from .kernel_launch import VECTOR_BYTES, c_name, kernel, num_multiprocessors, optional

MAX_STREAMED_ROWS = 8  # of x in skinny_gemm.cu
MAX_STAGED_BYTES = 100 * 1024  # of x in shared memory: two blocks share 227 KiB


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    if batch_invariant:
        return _batch_invariant_linear(x, weight, bias, norm, eps, gated, add_to, out)
    streams = _can_stream(x, weight)
    if norm is not None and not (streams and _can_fuse_norm(x, norm)):
        x, norm = rms_norm(x, norm, eps), None
    if streams:
        return _streamed_linear(x, weight, bias, norm, eps, gated, add_to, out)
    if add_to is not None:
        add_to.addmm_(x, weight.t())
        return add_to if bias is None else add_to.add_(bias)
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    product = F.linear(x, weight, bias)
    return silu_and_mul(product) if gated else product


def _batch_invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Multiply as one expert, all tiles of which sum in one order; apply in separate steps what the GEMM cannot."""
    x = x.contiguous() if norm is None else rms_norm(x, norm, eps)
    if gated and bias is not None:
        return silu_and_mul(_batch_invariant_linear(x, weight, bias, None, eps, False, None, None))
    if out is None:
        out = x.new_empty(len(x), len(weight) // 2 if gated else len(weight))
    if out.numel():
        tiled_gemm(out, x, weight[None])
    if bias is not None:
        out += bias
    return out if add_to is None else add_to.add_(out)


def _can_stream(x: Tensor, weight: Tensor) -> bool:
    whole = x.shape[1] % 8 == 0 and x.is_contiguous() and weight.is_contiguous()
    aligned = x.data_ptr() % VECTOR_BYTES == 0 and weight.data_ptr() % VECTOR_BYTES == 0
    return 0 < len(x) <= MAX_STREAMED_ROWS and x.dtype in (torch.bfloat16, torch.float16) and whole and aligned


def _can_fuse_norm(x: Tensor, norm: Tensor) -> bool:
    """Return whether the GEMM can apply the norm. In float16 an unscaled row times the norm's weight may overflow."""
    return x.dtype == torch.bfloat16 and _fits_shared_memory(x) and norm.data_ptr() % VECTOR_BYTES == 0


def _fits_shared_memory(x: Tensor) -> bool:
    return _staged_bytes(x) <= MAX_STAGED_BYTES


def _staged_bytes(x: Tensor) -> int:
    """Return the shared memory that x takes; see `stride` in skinny_gemm.cu."""
    return len(x) * (-(-x.shape[1] // 64) * 64 + 32) * x.element_size()


def _streamed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    rows, size = x.shape
    features = len(weight) // 2 if gated else len(weight)
    if out is None:
        out = x.new_empty(rows, features) if add_to is None else add_to
    epilogue = 2 if gated else 0 if add_to is None else 1
    tiles, multiprocessors = -(-features // (8 if gated else 16)), num_multiprocessors(x.device.index)
    # With few tiles, all warps of a multiprocessor share one. A short row has few chunks to prefetch, and an x that is
    # not in shared memory leaves few registers for them.
    staged = _fits_shared_memory(x)
    warps = 16 if tiles <= multiprocessors or not staged else 8
    depth = 2 if not staged else max(2, min(4, -(-size // (64 * warps))))
    shared_bytes = _staged_bytes(x) if staged else 0
    name = f"skinny_gemm<{c_name(x)}, {warps}, {depth}, {str(staged).lower()}, {epilogue}>"
    launch = kernel("skinny_gemm.cu", name, shared_bytes=shared_bytes, early=True)
    sizes = np.float32(eps), np.int32(rows), np.int32(features), np.int32(size)
    grid = min(tiles, multiprocessors * (16 // warps)), 1
    launch(grid, 32 * warps, out, x, weight, optional(norm), optional(bias), *sizes)
    return out
