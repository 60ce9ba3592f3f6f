"""The checks of the arguments of expert_ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .argument_checks import check_fp8, require
from .arguments import MXFP4_BLOCK, ExpertMatrix, FP8Weight, MXFP4Weight
from .mxfp4_order import ROWS


def check_experts(
    x: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    add_to: Tensor | None,
) -> None:
    """Raise ValueError naming the tensor that does not fit the others, and the rule."""
    for name, matrix in (("gate_up", gate_up), ("down", down)):
        if isinstance(matrix, FP8Weight):
            check_fp8(name, matrix)
        elif isinstance(matrix, MXFP4Weight):
            _check_mxfp4(name, matrix, x)
    first, second = (m.data if isinstance(m, FP8Weight | MXFP4Weight) else m for m in (gate_up, down))
    require(first.dim() == 3 and first.is_contiguous(), "gate_up", first, "must be [N, 2 I, D], contiguous")
    num_experts, rows, size = gate_up.shape
    fits = 2 * down.shape[-1] == rows and down.shape[:-1] == (num_experts, size) and second.is_contiguous()
    require(fits, "down", second, f"must be [{num_experts}, {size}, {rows} / 2], contiguous")
    require(x.dim() == 2 and x.shape[1] == size, "x", x, f"must be [T, {size}] for gate_up {list(gate_up.shape)}")
    same = first.dtype == second.dtype and first.dtype in (x.dtype, torch.float8_e4m3fn, torch.uint8)
    require(same, "x", x, f"must have the dtype of the weights, {first.dtype}")
    for name, bias, features in (("gate_up_bias", gate_up_bias, rows), ("down_bias", down_bias, size)):
        if bias is not None:
            fits = bias.shape == (num_experts, features) and bias.dtype == x.dtype and bias.is_contiguous()
            require(fits, name, bias, f"must be [{num_experts}, {features}] {x.dtype}, contiguous")
    if add_to is not None:
        fits = add_to.shape == x.shape and add_to.dtype == x.dtype and add_to.is_contiguous()
        require(fits, "add_to", add_to, f"must be {list(x.shape)} {x.dtype}, contiguous")
    pairs = expert_ids.dim() == 2 and len(expert_ids) == len(x) and expert_ids.dtype == torch.int64
    require(pairs, "expert_ids", expert_ids, f"must be [{len(x)}, K] int64")
    scored = scores.shape == expert_ids.shape and scores.dtype == torch.float32
    require(scored, "scores", scores, f"must be {list(expert_ids.shape)} float32")
    for name, tensor, columns in (("x", x, size), ("gate_up", first, size), ("down", second, down.shape[-1])):
        # FP8 and MXFP4 are widened to the dtype of x.
        aligned = columns * x.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        rule = "must have rows of whole, aligned 16-byte vectors on a GPU"
        require(aligned or not tensor.is_cuda, name, tensor, rule)


def _check_mxfp4(name: str, weight: MXFP4Weight, x: Tensor) -> None:
    require(weight.data.dtype == weight.scales.dtype == torch.uint8, name, weight.data, "must be uint8")
    fits = weight.data.dim() == 3 and weight.shape[-1] % MXFP4_BLOCK == 0
    fits = fits and weight.shape[1] % ROWS == 0
    require(fits, name, weight.data, f"must be [N, F, D / 2], D a multiple of {MXFP4_BLOCK} and F of {ROWS}")
    grid = [*weight.shape[:2], weight.shape[2] // MXFP4_BLOCK]
    fits = list(weight.scales.shape) == grid and weight.scales.is_contiguous()
    require(fits, f"{name}.scales", weight.scales, f"must be {grid}, contiguous")
    require(x.dtype == torch.bfloat16 or not x.is_cuda, "x", x, "must be bfloat16 for MXFP4 on a GPU")


def check_selection(logits: Tensor, count: int, bias: Tensor | None) -> None:
    """Check the arguments of `select_experts`."""
    require(logits.dim() == 2 and logits.is_floating_point(), "logits", logits, "must be [T, N], floating point")
    fits = logits.shape[1] <= 512 or not logits.is_cuda
    require(1 <= count <= logits.shape[1] and fits, "logits", logits, f"must have {count} to 512 experts")
    if bias is not None:
        fits = bias.shape in (logits.shape, logits.shape[1:]) and bias.dtype == torch.float32
        require(fits, "bias", bias, f"must be [{logits.shape[1]}] or {list(logits.shape)} float32")
