"""Linear layers of FP8 weights and FP8 activations: by fp8_gemm or stream_fp8, and by cuBLAS or CUTLASS for many rows.

Activations are scaled for each 128 columns of a row; for the library's GEMM of a weight without blocks, for each row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import FP8Rows, FP8Weight, Matrix, Rows
from . import stream_fp8
from .kernel_launch import (
    MAX_THREADS,
    VECTOR_BYTES,
    c_name,
    compute_capability,
    kernel,
    num_multiprocessors,
    num_threads,
    optional,
    tile_map,
)

GROUP = 128  # columns of a scale of activations; mirrors GROUP of quantize_rows.cu and STEP of fp8_gemm.cu
MAX_UNQUANTIZED_ROWS = 8  # mirrors MAX_SKINNY_ROWS of gemm.py
ALIGNMENT = 4  # scales of activations are copied four at once; in cuBLAS rows and columns of block scales are multiples
GROUP_ROWS, WEIGHT_ROWS = 64, 128  # rows of the weight of four warps and of a block; GROUP_ROWS and TILE of fp8_gemm.cu
CONSUMERS = 256  # threads of a block that multiply; a warp more copies
STAGES = {16: 6, 32: 5, 64: 4}  # steps in shared memory by the rows of x of a tile; two blocks share the memory
MAX_ROW_THREADS = 1024  # of quantize_rows
MAX_PARTS = 4  # blocks of a cluster; 8 are slower
MIN_STEPS = 4  # of 128 columns for each block of a cluster
Epilogue = Literal["STORE", "ADD", "SILU"]  # Epilogue in fp8_gemm.cu and wide_gemm.cu, and Finish
EPILOGUES: tuple[Epilogue, ...] = ("STORE", "ADD", "SILU")


def takes(x: Tensor, weight: FP8Weight) -> bool:
    """Return whether `scaled_linear` takes these tensors."""
    features, size = weight.shape
    aligned = all(t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0 for t in (x, weight.data))
    vectors = size % VECTOR_BYTES == 0 and features % 16 == 0 and weight.first % VECTOR_BYTES == 0
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and aligned and vectors and weight.columns % GROUP == 0 and compute_capability(x.device.index) == (9, 0)


def has_two_fp8_gemms(x: Tensor, weight: FP8Weight) -> bool:
    return takes(x, weight) and _library_takes(x, weight)


def takes_fp8_rows(weight: Matrix | None, x: Tensor) -> bool:
    """Return whether `linear` of this weight takes FP8Rows, as many as rows of x."""
    if not isinstance(weight, FP8Weight) or len(x) <= MAX_UNQUANTIZED_ROWS:
        return False
    # With one scale a row cuBLAS wants one for each row of x, too.
    whole = _is_blocked(weight) and weight.shape[1] % GROUP == 0 and weight.columns == GROUP and weight.first == 0
    aligned = weight.data.is_contiguous() and weight.data.data_ptr() % VECTOR_BYTES == 0 and weight.shape[0] % 16 == 0
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and whole and aligned and compute_capability(x.device.index) == (9, 0)


def fp8_rows(rows: int, columns: int, like: Tensor) -> FP8Rows:
    """Return FP8Rows to be written, for groups of whole columns, on the device and of the dtype of `like`."""
    padded = -(-rows // ALIGNMENT) * ALIGNMENT
    numbers = torch.empty(padded, columns, dtype=torch.float8_e4m3fn, device=like.device)
    return FP8Rows(numbers, torch.empty(columns // GROUP, padded, device=like.device), rows, like.dtype)


def epilogue_of(gated: bool, add_to: Tensor | None) -> Epilogue:
    """Return what follows the products of `linear`."""
    return "ADD" if add_to is not None else "SILU" if gated else "STORE"


def target_of(x: Rows, weight_rows: int, gated: bool, add_to: Tensor | None, out: Tensor | None) -> Tensor:
    """Return the tensor for the result of `linear`, a new one if there is none."""
    target = add_to if out is None else out
    if target is not None:
        return target
    device = x.numbers.device if isinstance(x, FP8Rows) else x.device
    return torch.empty(len(x), weight_rows // (2 if gated else 1), dtype=x.dtype, device=device)


def scaled_linear(
    x: Rows,
    weight: FP8Weight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
    batch_invariant: bool,
) -> Tensor:
    """Do `linear` with activations in FP8."""
    tiled = _is_tiled(x, weight, batch_invariant)
    if isinstance(x, FP8Rows):
        numbers, scales = x.numbers, x.scales
    else:
        numbers, scales = quantize_rows(x, norm, eps, grouped=tiled or _is_blocked(weight), first=weight.first)
    epilogue, target = epilogue_of(gated, add_to), target_of(x, weight.shape[0], gated, add_to, out)
    if tiled:
        _tiled_gemm(target, numbers, scales, weight, bias, epilogue, batch_invariant)
        return target
    products = _library_gemm(numbers, scales, weight, x.dtype)[: len(x)]
    if bias is None and epilogue == "STORE":
        return products if out is None else out.copy_(products)
    finish_products(target, products, bias, epilogue)
    return target


def _is_tiled(x: Rows, weight: FP8Weight, batch_invariant: bool) -> bool:
    """Return whether a kernel of lockstep multiplies these rows, not the library's."""
    return batch_invariant or len(x) <= weight.choice.tiled_rows or not _library_takes(x, weight)


def _is_blocked(weight: FP8Weight) -> bool:
    """Return whether a row of the weight has several scales."""
    return weight.scales.shape[1] > 1


def _tiled_gemm(
    out: Tensor,
    numbers: Tensor,
    scales: Tensor,
    weight: FP8Weight,
    bias: Tensor | None,
    epilogue: Epilogue,
    batch_invariant: bool,
) -> None:
    """Write or add the products of stream_fp8 or fp8_gemm.

    With batch_invariant it is fp8_gemm, and the order of a sum depends on the weight alone.
    """
    if not batch_invariant and stream_fp8.takes(weight):
        multiprocessors = num_multiprocessors(out.device.index)
        tile = stream_fp8.fastest_fp8_tile(len(out), *weight.shape, epilogue == "SILU", multiprocessors)
        if tile is not None:
            stream_fp8.launch_stream_fp8(out, numbers, scales, weight, bias, EPILOGUES.index(epilogue), tile)
            return
    launch_fp8_gemm(out, numbers, scales, weight, bias, epilogue, batch_invariant)


def launch_fp8_gemm(
    out: Tensor,
    numbers: Tensor,
    scales: Tensor,
    weight: FP8Weight,
    bias: Tensor | None,
    epilogue: Epilogue,
    batch_invariant: bool,
) -> None:
    """Write or add the products of fp8_gemm."""
    (rows, features), size = out.shape, numbers.shape[1]
    tile_rows = next((n for n in STAGES if rows <= n), max(STAGES))
    tiles = -(-features // (GROUP_ROWS if epilogue == "SILU" else WEIGHT_ROWS))
    row_tiles = -(-rows // tile_rows)
    parts = _num_parts(tiles * (1 if batch_invariant else row_tiles), size, num_multiprocessors(out.device.index))
    launch = kernel(
        "fp8_gemm.cu",
        f"fp8_gemm<{c_name(out)}, {tile_rows}, {STAGES[tile_rows]}>",
        shared_bytes=STAGES[tile_rows] * ((WEIGHT_ROWS + tile_rows) * GROUP + 4 * tile_rows + 16),
        early=True,
        cluster=parts,
        architecture="sm_90a",
    )
    shifts = weight.rows.bit_length() - 1, weight.columns.bit_length() - 1
    sizes = rows, scales.shape[1], features, size, weight.first, *shifts, weight.scales.shape[1]
    maps = tile_map(numbers[:rows], tile_rows), tile_map(weight.data, GROUP_ROWS)
    tensors = out, maps[0], scales, maps[1], weight.scales, optional(bias)
    grid = tiles * row_tiles * parts, 1
    launch(grid, CONSUMERS + 32, *tensors, *map(np.int32, (*sizes, EPILOGUES.index(epilogue), parts)))


def _num_parts(tiles: int, size: int, multiprocessors: int) -> int:
    """Return how many blocks share the columns of a tile: as many as are useful at once, at most MAX_PARTS."""
    steps, most = -(-size // GROUP), 3 * multiprocessors // 2  # more blocks than this are slower
    if 0 < tiles - 2 * multiprocessors <= multiprocessors // 8 and steps >= 2 * MIN_STEPS:
        return 2  # else few blocks would run at the end, after all others
    return max(1, min(MAX_PARTS, most // tiles, steps // MIN_STEPS))


def _library_takes(x: Rows, weight: FP8Weight) -> bool:
    """Return whether `scaled_mm` has a fast GEMM for these tensors. Of float16, for blocks only."""
    blocks = weight.rows == weight.columns == GROUP and weight.first == 0 and weight.scales.shape[1] % ALIGNMENT == 0
    return x.shape[1] % GROUP == 0 and (blocks if _is_blocked(weight) else x.dtype == torch.bfloat16)


def _library_gemm(numbers: Tensor, scales: Tensor, weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    """Return `x @ weight^T` [T, F] of the FP8 numbers and scales of x."""
    if not _is_blocked(weight):
        columns = weight.scales.repeat_interleave(min(weight.rows, weight.shape[0]), 0)[: weight.shape[0]]
        return torch._scaled_mm(
            numbers, weight.data.t(), scales[:, None], columns.t().contiguous(), out_dtype=dtype, use_fast_accum=True
        )
    return F.scaled_mm(
        numbers,
        weight.data.t(),
        scales.t(),
        F.ScalingType.BlockWise1x128,
        weight.scales.t(),
        F.ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )


def quantize_hidden(products: Tensor, bias: Tensor | None) -> FP8Rows:
    """Return `silu(gate) * up` in FP8; products [T, 2 F] are those of gate and up, to which the bias adds."""
    features = products.shape[1] // 2
    out = fp8_rows(len(products), features, products)
    launch = kernel("quantize_rows.cu", f"quantize_rows<{c_name(products)}, GATED, true>", early=True)
    grid = len(products), -(-features // (8 * MAX_THREADS))
    sizes = np.float32(0), *map(np.int32, (features, 0, len(out.numbers)))
    launch(grid, num_threads(features // 8), out.numbers, out.scales, products, optional(bias), *sizes)
    return out


def quantize_rows(
    x: Tensor, norm: Tensor | None, eps: float, *, grouped: bool, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Return rows of x [T, D], or of their RMSNorm, in FP8, [padded, D], and their scales in float32.

    The scales are [padded], or [groups, padded] if grouped. T of `padded` rows, a multiple of ALIGNMENT, are written. A
    group is 128 columns; `first` is the place of column 0 in its group.
    """
    rows, size = x.shape
    padded = -(-rows // ALIGNMENT) * ALIGNMENT
    groups = -(-(first + size) // GROUP)
    numbers = torch.empty(padded, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((groups, padded) if grouped else (padded,), dtype=torch.float32, device=x.device)
    options = f"{'PLAIN' if norm is None else 'NORMED'}, {str(grouped).lower()}"
    launch = kernel("quantize_rows.cu", f"quantize_rows<{c_name(x)}, {options}>", early=True)
    vectors = groups * GROUP // 8
    parts = -(-vectors // MAX_THREADS) if grouped and norm is None else 1
    sizes = np.float32(eps), np.int32(size), np.int32(first if grouped else 0), np.int32(padded)
    # With a norm a block has a whole row: more threads read it at once.
    threads = num_threads(vectors) if parts > 1 else min(MAX_ROW_THREADS, -(-vectors // 32) * 32)
    launch((rows, parts), threads, numbers, scales, x, optional(norm), *sizes)
    return numbers, scales


def scaled_hidden(
    x: Tensor, weight: FP8Weight, bias: Tensor | None, norm: Tensor | None, eps: float, batch_invariant: bool
) -> Rows:
    """Do `gated_linear` with activations in FP8, for a layer that takes FP8Rows."""
    if not _is_tiled(x, weight, batch_invariant):
        numbers, scales = quantize_rows(x, norm, eps, grouped=_is_blocked(weight), first=weight.first)
        return quantize_hidden(_library_gemm(numbers, scales, weight, x.dtype)[: len(x)], bias)
    tile = None
    if bias is None and not batch_invariant and stream_fp8.takes(weight):
        tile = stream_fp8.quantizing_tile(len(x), weight.shape[0], num_multiprocessors(x.device.index))
    if tile is None:
        return scaled_linear(x, weight, bias, norm, eps, True, None, None, batch_invariant)
    numbers, scales = quantize_rows(x, norm, eps, grouped=True)
    hidden = fp8_rows(len(x), weight.shape[0] // 2, x)
    stream_fp8.launch_stream_fp8(hidden, numbers, scales, weight, None, EPILOGUES.index("SILU"), tile)
    return hidden


def finish_products(target: Tensor, products: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
    """Apply the bias and SiLU to the result of a GEMM [T, F]; write it to `target`, or add it."""
    features = target.shape[1]
    launch = kernel("quantize_rows.cu", f"finish_products<{c_name(products)}, {epilogue}>", early=True)
    grid = len(products), -(-features // (8 * MAX_THREADS))
    launch(grid, num_threads(features // 8), target, products, optional(bias), np.int32(features))
