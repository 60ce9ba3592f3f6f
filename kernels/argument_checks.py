"""Checks of arguments that several ops share; each raises ValueError with the tensor's name, shape, dtype and rule."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .arguments import FP8Rows, FP8Weight, Matrix, Rope, Rows


def require(condition: bool, name: str, tensor: Tensor, rule: str) -> None:
    """Raise ValueError unless the condition holds; `rule` is the predicate of a sentence about the tensor."""
    if not condition:
        refuse(name, tensor, rule)


def refuse(name: str, tensor: Tensor, rule: str) -> NoReturn:
    """Raise the ValueError of `require`. Ops of every layer make the text of a rule only for an error."""
    raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} {rule}")


def check_fp8(name: str, weight: FP8Weight) -> None:
    """Check that data and scales of an FP8 weight fit each other, and that its blocks are powers of two."""
    require(weight.data.dtype == torch.float8_e4m3fn, name, weight.data, "must be float8_e4m3fn")
    *experts, rows, columns = weight.shape
    grid = [*experts, -(-rows // weight.rows), -(-(weight.first + columns) // weight.columns)]
    scales = weight.scales
    fits = list(scales.shape) == grid and scales.dtype == torch.float32 and scales.is_contiguous()
    require(fits, f"{name}.scales", scales, f"must be {grid} float32, contiguous")
    powers = all(n > 0 and n & (n - 1) == 0 for n in (weight.rows, weight.columns))
    require(powers and 0 <= weight.first < weight.columns, name, weight.data, "must have blocks of powers of two")


def check_heads(qkv: Tensor, multiple: int = 1) -> None:
    """Raise ValueError unless the heads of a row are contiguous, and rows start at a `multiple` of bytes on a GPU."""
    aligned = not qkv.is_cuda or qkv.stride(0) * qkv.element_size() % multiple == 0
    if not (qkv.dim() == 2 and qkv.stride(1) == 1 and aligned):
        rule = f"must be [T, (H + 2 Hkv) E]; rows may have any stride, on a GPU a multiple of {multiple} bytes"
        refuse("qkv", qkv, rule)


def check_linear(
    x: Rows, weight: Matrix, norm: Tensor | None, add_to: Tensor | None, out: Tensor | None, *, gated: bool
) -> None:
    """Check the arguments of `ops.linear`."""
    if isinstance(weight, FP8Weight):
        check_fp8("weight", weight)
    rows = x.numbers if isinstance(x, FP8Rows) else x
    if isinstance(x, FP8Rows):
        takes = isinstance(weight, FP8Weight) and weight.columns == 128 and weight.first == 0 and norm is None
        require(takes, "x", rows, "is quantized: the weight needs blocks of 128 columns, and there is no norm")
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1]:
        refuse("x", rows, f"must be [T, {weight.shape[1]}]")
    if norm is not None and norm.shape != x.shape[1:]:
        refuse("x", rows, "must have as many columns as the norm's weight")
    alone = not gated and (add_to is None or out is None)
    for name, target in (("add_to", add_to), ("out", out)):
        if target is not None:
            fits = target.shape == (x.shape[0], weight.shape[0]) and target.dtype == x.dtype and target.is_contiguous()
            if not (fits and alone):
                rule = f"must be [{len(x)}, {weight.shape[0]}] {x.dtype}, contiguous, not gated, and alone"
                refuse(name, target, rule)


def check_batch_invariant(x: Tensor, weight: Matrix) -> None:
    """Check that the batch-invariant GEMM takes the rows of this weight."""
    stored = weight.data if isinstance(weight, FP8Weight) else weight
    aligned = stored.shape[1] % 8 == 0 and stored.data_ptr() % 16 == 0 and stored.is_contiguous()
    half = x.dtype in (torch.bfloat16, torch.float16)
    require(aligned and half, "weight", stored, "must have rows of whole, aligned 16-byte vectors of 16-bit floats")


def check_rotary(rope: Rope, head_dim: int) -> None:
    """Check that the rotary table fits heads of this size."""
    if rope.cos_sin.dim() != 2 or rope.cos_sin.shape[1] not in range(0, head_dim + 1, 2):
        refuse("cos_sin", rope.cos_sin, f"must be [P, R] with an even R of at most {head_dim}")


def check_logits(logits: Tensor) -> None:
    """Check that logits are a matrix of floating-point numbers."""
    require(logits.dim() == 2 and logits.is_floating_point(), "logits", logits, "must be [S, V], floating point")


def check_rows(rows: int, **parameters: Tensor) -> None:
    """Check sampling parameters, one per row: int64 for `keys` and `top_k`, float32 for the others."""
    for name, tensor in parameters.items():
        dtype = torch.int64 if name in ("keys", "top_k") else torch.float32
        fits = tensor.shape == (rows,) and tensor.dtype == dtype and tensor.is_contiguous()
        require(fits, name, tensor, f"must be [{rows}] {dtype}")


def check_int32(shape: torch.Size, **tensors: Tensor) -> None:
    """Check that the tensors are int32 and have this shape."""
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.dtype != torch.int32:
            refuse(name, tensor, f"must be {list(shape)} int32")
