"""Linear layers: skinny_gemm for up to 8 rows, stream_gemm for up to 64, and cuBLAS for more.

Batch-invariant ones are done by wide_gemm or grouped_gemm.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import FP8Rows, FP8Weight, Matrix, Rows
from . import scaled_gemm, stream_gemm, wide_gemm
from .elementwise import rms_norm, silu_and_mul
from .expert_gemm import NO_SCALES, ExpertTiles, can_widen, multiply_tiles, scale_arguments, tile_rows
from .kernel_launch import (
    NULL,
    VECTOR_BYTES,
    c_name,
    kernel,
    max_shared_bytes,
    num_multiprocessors,
    optional,
)
from .launch_parameters import Argument

MAX_SKINNY_ROWS = 8  # rows of x; mirrors ROWS of skinny_gemm.cu
# The most that x takes of shared memory. Loads on their way need L1, which has what shared memory leaves of 256 KiB.
MAX_STAGED_BYTES, MAX_STAGED_FP8_BYTES = 145 * 1024, 100 * 1024
# With fewer columns, or as many with a norm, two blocks of 8 warps run on a multiprocessor. They hide the norm.
MIN_COLUMNS_OF_16_WARPS = 2048
SUM_BYTES = (2 * 17 + 1) * MAX_SKINNY_ROWS * 4  # of a warp: `sums` and `squares` of skinny_gemm.cu

Epilogue = Literal["STORE", "ADD", "SILU", "PUSH"]  # the names of Epilogue in skinny_gemm.cu


def linear(
    x: Rows,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    if isinstance(x, FP8Rows):
        assert isinstance(weight, FP8Weight)
        return scaled_gemm.scaled_linear(x, weight, bias, None, eps, gated, add_to, out, batch_invariant)
    skinny, is_stored = _is_skinny(x, weight) and not batch_invariant, True
    if isinstance(weight, FP8Weight) and not skinny:
        if len(x) and scaled_gemm.takes(x, weight):
            return scaled_gemm.scaled_linear(x, weight, bias, norm, eps, gated, add_to, out, batch_invariant)
        if not can_widen(x, weight):
            weight, is_stored = weight.dequantized(x.dtype), False  # a kernel that starts early must not read it yet
    if norm is not None and not (skinny and _can_fuse_norm(x, norm, weight)):
        x, norm = rms_norm(x, norm, eps), None
    if skinny:
        target = scaled_gemm.target_of(x, weight.shape[0], gated, add_to, out)
        _skinny_gemm(target, x, weight, norm, bias, eps, scaled_gemm.epilogue_of(gated, add_to))
        return target
    if batch_invariant and is_stored and isinstance(weight, Tensor) and wide_gemm.takes(x, weight):
        return wide_gemm.wide_linear(x.contiguous(), weight, bias, gated, add_to, out)
    if batch_invariant or isinstance(weight, FP8Weight):
        product = _batch_invariant_linear(x.contiguous(), weight, bias, gated, out)
        return product if add_to is None else add_to.add_(product)
    others = [t for t in (bias, add_to, out) if t is not None]
    if is_stored and stream_gemm.takes(x, weight, gated, *others):
        return stream_gemm.stream_linear(x, weight, bias, gated, add_to, out)
    if add_to is not None:
        add_to.addmm_(x, weight.t())
        return add_to if bias is None else add_to.add_(bias)
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    product = F.linear(x, weight, bias)
    return silu_and_mul(product) if gated else product


def gated_linear(
    x: Tensor,
    weight: Matrix,
    feeds: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    batch_invariant: bool = False,
) -> Rows:
    if isinstance(weight, FP8Weight) and scaled_gemm.takes(x, weight) and scaled_gemm.takes_fp8_rows(feeds, x):
        return scaled_gemm.scaled_hidden(x, weight, bias, norm, eps, batch_invariant)
    return linear(x, weight, bias, norm=norm, eps=eps, gated=True, batch_invariant=batch_invariant)


def _batch_invariant_linear(x: Tensor, weight: Matrix, bias: Tensor | None, gated: bool, out: Tensor | None) -> Tensor:
    """Multiply as one expert that has all rows: all tiles sum in one order."""
    if out is None:
        out = x.new_empty(len(x), weight.shape[0] // 2 if gated else weight.shape[0])
    if out.numel():
        rows = tile_rows(len(x))
        tiles = ExpertTiles(None, None, rows, -(-len(x) // rows))
        expert = weight.expert(None) if isinstance(weight, FP8Weight) else weight[None]
        multiply_tiles(out, x, expert, bias, "SILU" if gated else "PLAIN", None, tiles)
    return out


def _is_skinny(x: Tensor, weight: Matrix) -> bool:
    """Return whether skinny_gemm takes these tensors."""
    if not 0 < x.shape[0] <= MAX_SKINNY_ROWS:
        return False
    data, step = (weight.data, 16) if isinstance(weight, FP8Weight) else (weight, 8)
    contiguous = x.shape[1] % step == 0 and x.is_contiguous() and data.is_contiguous()
    aligned = x.data_ptr() % VECTOR_BYTES == 0 and data.data_ptr() % VECTOR_BYTES == 0
    blocks = not isinstance(weight, FP8Weight) or (weight.columns % 128 == 0 and weight.first % 16 == 0)
    return x.dtype in (torch.bfloat16, torch.float16) and contiguous and aligned and blocks


def _can_fuse_norm(x: Tensor, norm: Tensor, weight: Matrix) -> bool:
    """Return whether the GEMM can apply the norm. In float16 an unscaled row times the norm's weight may overflow."""
    if x.dtype != torch.bfloat16 or norm.data_ptr() % VECTOR_BYTES:
        return False
    if isinstance(weight, FP8Weight):
        return _skinny_shape(x, weight, norm).staged_bytes > 0
    rows = MAX_SKINNY_ROWS + 1  # of x, whatever its number is: a norm of its own rounds once more
    return _shape_of_16_bits(rows, x.shape[1], max_shared_bytes(x.device.index), is_normed=True).staged_bytes > 0


class SkinnyShape(NamedTuple):
    """A shape of skinny_gemm: the warps of a block, and the chunks of columns that each loads ahead."""

    warps: int
    depth: int
    staged_bytes: int = 0  # of shared memory that x takes; 0 if it is read from memory


def can_send(x: Rows, weight: Matrix) -> TypeGuard[Tensor]:
    """Return whether `send_linear` takes these tensors; their addresses and the rank's columns also decide."""
    if isinstance(x, FP8Rows) or weight.shape[0] % 8 or not _is_skinny(x, weight):
        return False
    shape = _skinny_shape(x, weight, None)
    room = max_shared_bytes(x.device.index) - shape.warps * SUM_BYTES
    return shape.staged_bytes < room  # NextPush of peer_protocol.cuh takes 8 bytes


def send_linear(x: Tensor, weight: Matrix, bias: Tensor | None, peers: Tensor, ranks: int) -> None:
    """Send `x @ weight^T + bias` to all ranks, with the bits of `linear`; no memory of this rank has the result.

    The next push of this rank is `receive_add_rms_norm` of peer_memory.py.
    peers  the fields of a PeerTable of `ranks` ranks
    """
    nowhere = x.new_empty(0, weight.shape[0])
    _skinny_gemm(nowhere, x, weight, None, bias, 0.0, "PUSH", (peers, np.int32(ranks)))


def _skinny_gemm(
    out: Tensor,
    x: Tensor,
    weight: Matrix,
    norm: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    peers: tuple[Argument, np.int32] = (NULL, np.int32(0)),
) -> None:
    (rows, size), features = x.shape, out.shape[1]
    shape = _skinny_shape(x, weight, norm)
    data, scales = (weight.data, scale_arguments(weight)) if isinstance(weight, FP8Weight) else (weight, NO_SCALES)
    is_normed = norm is not None and not isinstance(weight, FP8Weight)  # NORMED of skinny_gemm.cu
    staged, normed = (str(flag).lower() for flag in (shape.staged_bytes > 0, is_normed))
    name = f"skinny_gemm<{c_name(x)}, {c_name(data)}, {shape.warps}, {shape.depth}, {staged}, {normed}, {epilogue}>"
    launch = kernel("skinny_gemm.cu", name, shared_bytes=shape.staged_bytes, early=True)
    sizes = np.float32(eps), np.int32(rows), np.int32(features), np.int32(size)
    tiles = -(-features // (8 if epilogue == "SILU" else 16))
    grid = min(tiles, num_multiprocessors(x.device.index) * max(1, 16 // shape.warps)), 1
    launch(grid, 32 * shape.warps, out, x, data, optional(norm), optional(bias), *sizes, *scales, *peers)


def _skinny_shape(x: Tensor, weight: Matrix, norm: Tensor | None) -> SkinnyShape:
    staged_rows, size, shared_bytes = len(x) + (norm is not None), x.shape[1], max_shared_bytes(x.device.index)
    if isinstance(weight, FP8Weight):
        return _fp8_shape(staged_rows, size, weight.first, shared_bytes)
    return _shape_of_16_bits(staged_rows, size, shared_bytes, is_normed=norm is not None)


@functools.cache
def _shape_of_16_bits(staged_rows: int, size: int, shared_bytes: int, *, is_normed: bool) -> SkinnyShape:
    """Return the shape of skinny_gemm for a weight in 16 bits.

    The warps depend on the columns and the norm only. So they share the columns of a row alike, and its result has the
    same bits in any batch. A warp loads 4 or 5 chunks ahead, whichever leaves fewer steps without a chunk; fewer in a
    short row. An x that is not in shared memory leaves few registers for them.
    """
    warps = 16 if size > MIN_COLUMNS_OF_16_WARPS or (size == MIN_COLUMNS_OF_16_WARPS and not is_normed) else 8
    staged_bytes = staged_rows * (-(-size // 64) * 64 + 32) * 2  # see `stride` in skinny_gemm.cu
    if staged_bytes > min(MAX_STAGED_BYTES, shared_bytes - (warps + 1) * SUM_BYTES):
        return SkinnyShape(warps, 2)
    chunks = -(-size // (64 * warps))
    depth = min((4, 5), key=lambda depth: -(-chunks // depth) * depth) if chunks > 3 else max(2, chunks)
    return SkinnyShape(warps, depth, staged_bytes)


@functools.cache
def _fp8_shape(staged_rows: int, size: int, first: int, shared_bytes: int) -> SkinnyShape:
    """Return the shape of skinny_gemm for an FP8 weight.

    Warps that lack a chunk in a step load nothing, and bytes under way are what the speed depends on. So the shape is
    the one with the fewest such warps, of equal ones the larger: 16 warps for 4096 columns, 20 for 5120.
    """
    staged_bytes = staged_rows * (-(-size // 128) * 128 + 8) * 2  # see `stride` in skinny_gemm.cu
    chunks = -(-(first + size) // 128)
    warps = min((20, 16), key=lambda warps: -(-chunks // (2 * warps)) * warps)
    fits = staged_bytes <= min(MAX_STAGED_FP8_BYTES, shared_bytes - warps * SUM_BYTES)
    return SkinnyShape(warps, 2, staged_bytes) if fits else SkinnyShape(8, 2)
