"""Inputs, tolerances and definitions that the tests of the ops share: on a CPU, on a GPU and in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.kernels import reference
from lockstep.kernels.arguments import FP8Weight, MXFP4Weight

# Relative to the largest value: one rounding of the result, and for the norms of the sum before it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float8_e4m3fn: 0.0}


def assert_close(actual: Tensor, expected: Tensor, factor: float = 1) -> None:
    scale = float(expected.abs().max().clamp(min=1)) * factor if expected.numel() else 1.0
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=scale * TOLERANCE[actual.dtype])


@dataclass
class SamplingInputs:
    """Random sampling parameters, one per row; some rows have no top-p or min-p."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor

    @classmethod
    def random(cls, rows: int, device: str) -> SamplingInputs:
        top_p, min_p = torch.rand(rows, device=device), torch.rand(rows, device=device) / 5
        top_p[::3], min_p[::2] = 1.0, 0.0
        keys = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
        temperature, top_k = torch.rand(rows, device=device) + 0.3, torch.randint(0, 40, (rows,), device=device)
        return cls(temperature, top_k, top_p, min_p, keys)

    def token(self, row: int, logits: Tensor, *, with_k: bool) -> int | None:
        """Return the token by definition, in float64; None if a bound is too close to a token to tell."""
        top_k = int(self.top_k[row]) if with_k else 0
        top_p, min_p = self.top_p[row].item(), self.min_p[row].item()
        scores, tokens = (logits.float() / self.temperature[row].cpu()).sort(descending=True, stable=True)
        likelihood = scores.double().softmax(0)
        kept = likelihood >= min_p * likelihood[0]
        kept[top_k or len(kept) :] = False
        renormalized = likelihood * kept / (likelihood * kept).sum()
        before = renormalized.cumsum(0) - renormalized
        if top_p < 1 and ((before - top_p).abs() < 1e-5).any():
            return None
        if ((likelihood - min_p * likelihood[0]).abs() < 1e-7).any() and min_p > 0:
            return None
        kept &= (before < top_p) | (top_p == 1)
        kept[0] = True
        masked, key = torch.where(kept, scores, -torch.inf)[None], self.keys[row : row + 1].cpu()
        sample = reference.gumbel_argmax(masked, torch.ones(1), key, tokens=tokens[None].int())
        return int(reference.merge_candidates(sample[None]))


def batch_invariant_linears(
    linear: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, before: Tensor
) -> list[Tensor]:
    """Return four batch-invariant linear layers of x [T, D].

    Two have half of the weight [2 F, D], and one of these is added to `before` [T, F]; two are gated.
    """
    features, normed = before.shape[1], {"norm": norm, "eps": 1e-5, "batch_invariant": True}
    return [
        linear(x, weight[:features], bias[:features], batch_invariant=True),
        linear(x, weight[:features], add_to=before.clone(), batch_invariant=True),
        linear(x, weight, gated=True, **normed),
        linear(x, weight, bias, gated=True, **normed),
    ]


def finished(sums: Tensor, bias: Tensor | None, epilogue: str, before: Tensor) -> Tensor:
    """Return what an epilogue makes of sums, in float64."""
    sums = sums if bias is None else sums + bias.double()
    gate, up = sums.chunk(2, dim=-1)
    return F.silu(gate) * up if epilogue == "SILU" else sums + before.double() if epilogue == "ADD" else sums


def random_fp8(rows: int, size: int, block_rows: int, block_columns: int, first: int = 0) -> FP8Weight:
    """Return a weight [rows, size] on the CPU whose products with normal x are near 1; its scales differ by up to 8."""
    data = (torch.randn(rows, size) * 100).clamp(-448, 448)
    data[:, ::7] = torch.randn(rows, -(-size // 7)) / 256  # subnormal numbers, too
    grid = -(-rows // block_rows), -(-(first + size) // block_columns)
    scales = 2 ** (torch.rand(grid) * 3) / 200 / size**0.5
    return FP8Weight(data.to(torch.float8_e4m3fn), scales, block_rows, block_columns, first)


def random_mxfp4(experts: int, rows: int, size: int) -> MXFP4Weight:
    """Return weights on the CPU whose products with normal x are near 1; their scales differ, a few by much."""
    data = torch.randint(0, 256, (experts, rows, size // 2), dtype=torch.uint8)
    scales = torch.randint(120, 124, (experts, rows, size // 32), dtype=torch.uint8)
    scales[:, ::5, ::2] = torch.randint(0, 30, scales[:, ::5, ::2].shape, dtype=torch.uint8)
    return MXFP4Weight(data, scales)


def random_fp8_experts(
    count: int, rows: int, size: int, block_rows: int, block_columns: int, first: int = 0
) -> FP8Weight:
    """Return the matrices [count, rows, size] of experts, each by `random_fp8`."""
    parts = [random_fp8(rows, size, block_rows, block_columns, first) for _ in range(count)]
    data, scales = torch.stack([p.data for p in parts]), torch.stack([p.scales for p in parts])
    return parts[0]._replace(data=data, scales=scales)


def to_device(weight: FP8Weight, device: str) -> FP8Weight:
    return weight._replace(data=weight.data.to(device), scales=weight.scales.to(device))


def dequantized(weight: FP8Weight) -> Tensor:
    """Return the matrix in float64, one element's scale at a time."""
    rows, columns = (torch.arange(n, device=weight.data.device) for n in weight.shape[-2:])
    row, column = rows[:, None] // weight.rows, (weight.first + columns) // weight.columns
    return weight.data.double() * weight.scales.double()[..., row, column]
