"""Linear layers of FP8 weights for more rows than skinny_gemm takes: FP8 activations, and cuBLAS's or CUTLASS's GEMMs.

Activations are quantized for each row, or for each 128 columns of a row if the weight has blocks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import FP8Weight
from .kernel_launch import MAX_THREADS, VECTOR_BYTES, c_name, kernel, num_threads, optional

GROUP = 128  # columns of a scale of activations; mirrors GROUP of quantize_rows.cu
ALIGNMENT = 4  # rows of activations with group scales, and columns of block scales, are multiples of this in cuBLAS
MAX_UNSCALED_ROWS = 512  # up to here a GEMM without scales and a kernel that applies them are faster
Source = Literal["PLAIN", "NORM", "SILU"]  # the names of Source in quantize_rows.cu


def takes(x: Tensor, weight: FP8Weight) -> bool:
    """Return whether `scaled_linear` takes these tensors."""
    features, size = weight.shape
    by_block = weight.columns < size
    blocks = weight.rows == weight.columns == GROUP and weight.first == 0 and weight.scales.shape[1] % ALIGNMENT == 0
    aligned = all(t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0 for t in (x, weight.data))
    half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and by_block)  # unscaled sums may overflow float16
    fits = half and aligned and size % GROUP == 0 and features % 16 == 0 and (blocks or not by_block)
    return fits and torch.cuda.get_device_capability(x.device) == (9, 0)


def scaled_linear(
    x: Tensor,
    weight: FP8Weight,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Do `linear` with activations in FP8."""
    by_block = weight.columns < weight.shape[1]
    numbers, scales = quantize_rows(x, "PLAIN" if norm is None else "NORM", norm, eps, grouped=by_block)
    if by_block:
        products = F.scaled_mm(
            numbers,
            weight.data.t(),
            scales,
            F.ScalingType.BlockWise1x128,
            weight.scales.t(),
            F.ScalingType.BlockWise128x128,
            output_dtype=x.dtype,
        )[: len(x)]
        return _finish(products, None, None, bias, gated, add_to, out)
    if len(x) <= MAX_UNSCALED_ROWS:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        products = torch._scaled_mm(numbers, weight.data.t(), one, one, out_dtype=x.dtype, use_fast_accum=True)
        return _finish(products, scales, weight, bias, gated, add_to, out)
    columns = weight.scales.repeat_interleave(min(weight.rows, weight.shape[0]), 0)[: weight.shape[0]].t().contiguous()
    products = torch._scaled_mm(
        numbers, weight.data.t(), scales[:, None], columns, out_dtype=x.dtype, use_fast_accum=True
    )
    return _finish(products, None, None, bias, gated, add_to, out)


def quantize_rows(
    x: Tensor, source: Source, norm: Tensor | None, eps: float, *, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Return rows of x [T, D] in FP8 and their scales: [T], or [T, D / 128] with the rows of a group side by side.

    With groups, rows are added until their number is a multiple of ALIGNMENT; they are not written.
    """
    rows, size = len(x), x.shape[1] // (2 if source == "SILU" else 1)
    padded = -(-rows // ALIGNMENT) * ALIGNMENT if grouped else rows
    numbers = torch.empty(padded, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((size // GROUP, padded) if grouped else (rows,), dtype=torch.float32, device=x.device)
    launch = kernel("quantize_rows.cu", f"quantize_rows<{c_name(x)}, {source}, {str(grouped).lower()}>", early=True)
    shape = np.float32(eps), np.int32(size), np.int32(padded)
    launch((rows, 1), num_threads(size // 8), numbers, scales, x, optional(norm), *shape)
    return numbers, scales.t() if grouped else scales


def _finish(
    products: Tensor,
    row_scales: Tensor | None,
    weight: FP8Weight | None,
    bias: Tensor | None,
    gated: bool,
    add_to: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Apply the scales that the GEMM has not, the bias and SiLU; add to `add_to`, or write to `out`."""
    if row_scales is None and bias is None and not gated and add_to is None:
        return products if out is None else out.copy_(products)
    features = products.shape[1] // (2 if gated else 1)
    target = add_to if add_to is not None else out if out is not None else products.new_empty(len(products), features)
    finish = "ADD" if add_to is not None else "GATE" if gated else "STORE"
    shift = 0 if weight is None else weight.rows.bit_length() - 1
    launch = kernel("quantize_rows.cu", f"scale_products<{c_name(products)}, {finish}>", early=True)
    threads = num_threads(features // 8)
    grid = len(products), -(-features // (8 * MAX_THREADS))
    column_scales = optional(None if weight is None else weight.scales)
    arguments = optional(row_scales), column_scales, np.int32(shift), optional(bias), np.int32(features)
    launch(grid, threads, target, products, *arguments)
    return target
