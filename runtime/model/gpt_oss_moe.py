"""The mixture of experts of gpt-oss: biases everywhere, a clamped SwiGLU, weights in 16 bits or in MXFP4.

A rank holds its intermediate features of every expert. Of MXFP4 these are whole blocks of 32, which no rank divides.
The checkpoint alternates rows of gate and up; here the rows of gate come first.
Shapes: N experts, D hidden, I the rank's intermediate features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from ...kernels.arguments import MXFP4_BLOCK, ClampedSwiGLU, ExpertMatrix, MXFP4Weight
from .expert_config import Experts
from .norm import NormInput, Residual
from .rank_shares import share_of_features
from .weights import ALL, Piece, Weight, Weights

DUMMY_EXPONENT = 120  # of the scales of random weights: 2^(120 - 127) times numbers of up to 6
MAX_EXPONENT = 252  # a greater one makes some numbers infinite


@dataclass(frozen=True)
class ExpertPiece(Piece):
    """One expert's part of a tensor of all experts; the slices of `read` and `into` have the expert first."""

    transposed: bool = False  # the checkpoint has [inputs, outputs]
    interleaved: bool = False  # rows of gate and up alternate

    def value(self, tensor: Any) -> Tensor:
        part: Tensor = tensor[self.read]
        if self.transposed:
            part = part.transpose(1, 2)
        if self.interleaved:
            part = torch.cat((part[:, ::2], part[:, 1::2]), dim=1)
        return part.flatten(2) if part.dim() > 3 else part


@dataclass(frozen=True)
class MXFP4Data(Weight):
    """Pairs of 4-bit numbers, [N, F, D / 2] uint8."""

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        return ("U8",)

    def extremes(self, part: Tensor) -> Tensor:
        return torch.zeros(2, dtype=torch.float64, device=part.device)

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        part.random_(0, 256, generator=generator)


@dataclass(frozen=True)
class MXFP4Scales(MXFP4Data):
    """The exponents of blocks of 32 numbers, [N, F, D / 32] uint8."""

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        part.fill_(DUMMY_EXPONENT)

    def extremes(self, part: Tensor) -> Tensor:
        return torch.where(part.amax() > MAX_EXPONENT, torch.nan, 0.0).double().expand(2)


class GptOssMoE:
    """`sum of score * expert(x)` over the experts with the greatest logits; the scores are the softmax of these."""

    def __init__(self, weights: Weights, comm: Communicator, name: str, hidden_size: int, experts: Experts) -> None:
        assert experts.clamped is not None
        n, full, hidden = experts.num_experts, experts.intermediate_size, hidden_size
        self.num_per_token, self.swiglu = experts.num_per_token, ClampedSwiGLU(*experts.clamped)
        self.batch_invariant = weights.batch_invariant
        part = share_of_features(full, comm.rank, comm.size, experts.block)
        size, rows = part.stop - part.start, slice(2 * part.start, 2 * part.stop)
        self.router = weights.add((n, hidden), [Piece(f"{name}.router.weight", (n, hidden))])
        self.router_bias = weights.add((n,), [Piece(f"{name}.router.bias", (n,))])
        first, second = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
        self.gate_up: ExpertMatrix
        self.down: ExpertMatrix
        if experts.mxfp4:
            blocks = slice(part.start // MXFP4_BLOCK, part.stop // MXFP4_BLOCK)
            self.gate_up = _add_mxfp4(weights, first, (n, 2 * full, hidden), rows, ALL, interleaved=True)
            self.down = _add_mxfp4(weights, second, (n, hidden, full), ALL, blocks)
        else:
            shape, read = (n, hidden, 2 * full), (ALL, rows)
            pieces = _pieces(f"{first}", shape, read, transposed=True, interleaved=True)
            self.gate_up = weights.add((n, 2 * size, hidden), pieces)
            pieces = _pieces(f"{second}", (n, full, hidden), (part, ALL), transposed=True)
            self.down = weights.add((n, hidden, size), pieces)
        self.gate_up_bias = weights.add(
            (n, 2 * size), _pieces(f"{first}_bias", (n, 2 * full), (rows,), interleaved=True)
        )
        down_bias = weights.add((n, hidden), _pieces(f"{second}_bias", (n, hidden), (ALL,)))
        self.down_bias = down_bias if comm.rank == 0 else None  # the sum over the ranks contains the bias once

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Leave the experts' sum for rows [T, D] in `residual`; the next norm adds it."""
        x = normed.tensor()
        logits = ops.linear(x, self.router, self.router_bias, batch_invariant=self.batch_invariant)
        selected, scores = ops.select_experts(logits, self.num_per_token, normalized=True)
        residual.partial = ops.experts(
            x,
            selected,
            scores,
            self.gate_up,
            self.down,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            swiglu=self.swiglu,
        )


def _pieces(
    name: str, shape: tuple[int, ...], read: Sequence[slice], *, transposed: bool = False, interleaved: bool = False
) -> Iterable[Piece]:
    """Yield a piece for each expert of a tensor with all of them; `read` are the slices of the other dimensions."""
    for expert in range(shape[0]):
        only = slice(expert, expert + 1)
        yield ExpertPiece(name, shape, (only, *read), (only,), transposed=transposed, interleaved=interleaved)


def _add_mxfp4(
    weights: Weights, name: str, shape: tuple[int, int, int], rows: slice, blocks: slice, *, interleaved: bool = False
) -> MXFP4Weight:
    """Add the rank's rows and blocks of columns of the matrices [N, F, D] to `weights`."""
    n, features, columns = shape
    num_blocks = columns // MXFP4_BLOCK
    size = n, len(range(features)[rows]), len(range(num_blocks)[blocks])
    data = torch.zeros(*size[:2], size[2] * MXFP4_BLOCK // 2, dtype=torch.uint8, device=weights.device)
    scales = torch.zeros(*size, dtype=torch.uint8, device=weights.device)
    whole = n, features, num_blocks
    of_data = _pieces(f"{name}_blocks", (*whole, MXFP4_BLOCK // 2), (rows, blocks), interleaved=interleaved)
    weights.append(MXFP4Data(data, tuple(of_data)))
    of_scales = _pieces(f"{name}_scales", whole, (rows, blocks), interleaved=interleaved)
    weights.append(MXFP4Scales(scales, tuple(of_scales)))
    return MXFP4Weight(data, scales)
