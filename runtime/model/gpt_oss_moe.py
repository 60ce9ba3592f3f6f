"""The mixture of experts of gpt-oss: biases everywhere, a clamped SwiGLU, weights in 16 bits or in MXFP4.

A rank holds its intermediate features of every expert, or whole experts. Of MXFP4 the features are whole blocks of 32,
which no rank divides. The checkpoint alternates rows of gate and up; here the rows of gate come first.
Shapes: N experts, D hidden, I the intermediate features that the rank has of each of its M experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import expert_ops
from ...kernels.arguments import MXFP4_BLOCK, ClampedSwiGLU, ExpertMatrix, MXFP4Weight
from ...kernels.mxfp4_order import ordered_mxfp4, ordered_scales
from .expert_config import ExpertConfig
from .norm import NormInput, Residual
from .tensor_files import TensorFiles
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
class MXFP4Bytes(Weight):
    """Bytes of experts in MXFP4, each piece a whole expert of the rank, in the order of mxfp4_order.py."""

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        return ("U8",)

    def fill_ordered(self, tensors: TensorFiles, order: Callable[[Tensor], Tensor]) -> None:
        """Do `fill`; `order` puts the bytes of an expert into their order, on the device."""
        for piece in self.pieces:
            published = piece.value(tensors[piece.name]).to(self.tensor.device)
            self.tensor[piece.into].copy_(order(published))


@dataclass(frozen=True)
class MXFP4Data(MXFP4Bytes):
    """Pairs of 4-bit numbers, [M, F, D / 2] uint8."""

    def fill(self, tensors: TensorFiles) -> None:
        self.fill_ordered(tensors, ordered_mxfp4)

    def extremes(self, part: Tensor) -> Tensor:
        return torch.zeros(2, dtype=torch.float64, device=part.device)

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        part.random_(0, 256, generator=generator)


@dataclass(frozen=True)
class MXFP4Scales(MXFP4Bytes):
    """The exponents of blocks of 32 numbers, [M, F, D / 32] uint8."""

    def fill(self, tensors: TensorFiles) -> None:
        self.fill_ordered(tensors, ordered_scales)

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        part.fill_(DUMMY_EXPONENT)

    def extremes(self, part: Tensor) -> Tensor:
        return torch.where(part.amax() > MAX_EXPONENT, torch.nan, 0.0).double().expand(2)


class GptOssMoE:
    """`sum of score * expert(x)` over the experts with the greatest logits; the scores are the softmax of these."""

    def __init__(
        self, weights: Weights, comm: Communicator, name: str, hidden_size: int, experts: ExpertConfig
    ) -> None:
        assert experts.clamped is not None
        n, full, hidden = experts.num_experts, experts.intermediate_size, hidden_size
        self.num_per_token, self.swiglu = experts.num_per_token, ClampedSwiGLU(*experts.clamped)
        self.batch_invariant, self.adds_at_once = weights.batch_invariant, comm.size == 1
        share = experts.of_rank(comm.rank, comm.size)
        self.first_expert, part, mine = share.experts.start, share.features, share.experts
        count, size, rows = len(mine), share.num_features, slice(2 * part.start, 2 * part.stop)
        self.router = weights.add((n, hidden), [Piece(f"{name}.router.weight", (n, hidden))])
        self.router_bias = weights.add((n,), [Piece(f"{name}.router.bias", (n,))])
        first, second = f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"
        self.gate_up: ExpertMatrix
        self.down: ExpertMatrix
        if experts.mxfp4:
            blocks = slice(part.start // MXFP4_BLOCK, part.stop // MXFP4_BLOCK)
            self.gate_up = _add_mxfp4(weights, first, (n, 2 * full, hidden), mine, rows, ALL, interleaved=True)
            self.down = _add_mxfp4(weights, second, (n, hidden, full), mine, ALL, blocks)
        else:
            shape, read = (n, hidden, 2 * full), (ALL, rows)
            pieces = _pieces(f"{first}", shape, mine, read, transposed=True, interleaved=True)
            self.gate_up = weights.add((count, 2 * size, hidden), pieces)
            pieces = _pieces(f"{second}", (n, full, hidden), mine, (part, ALL), transposed=True)
            self.down = weights.add((count, hidden, size), pieces)
        biases = _pieces(f"{first}_bias", (n, 2 * full), mine, (rows,), interleaved=True)
        self.gate_up_bias = weights.add((count, 2 * size), biases)
        down_bias = weights.add((count, hidden), _pieces(f"{second}_bias", (n, hidden), mine, (ALL,)))
        # The sum over the ranks contains the bias of an expert once.
        self.down_bias = down_bias if comm.rank == 0 or experts.parallel else None

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Add the experts' sum for rows [T, D] to `residual`."""
        x, selected, scores = expert_ops.route_tokens(
            normed.x,
            self.router,
            self.num_per_token,
            norm=normed.weight,
            eps=normed.eps,
            logit_bias=self.router_bias,
            normalized=True,
            first_expert=self.first_expert,
            batch_invariant=self.batch_invariant,
        )
        add_to = residual.total if self.adds_at_once and not residual.separate else None
        out = expert_ops.experts(
            x,
            selected,
            scores,
            self.gate_up,
            self.down,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            swiglu=self.swiglu,
            add_to=add_to,
            batch_invariant=self.batch_invariant,
        )
        residual.partial = out if add_to is None else None


def _pieces(
    name: str,
    shape: tuple[int, ...],
    experts: range,
    read: Sequence[slice],
    *,
    transposed: bool = False,
    interleaved: bool = False,
) -> Iterable[Piece]:
    """Yield a piece for each of `experts` of a tensor with all; `read` are the slices of the other dimensions."""
    for place, expert in enumerate(experts):
        only, into = slice(expert, expert + 1), (slice(place, place + 1),)
        yield ExpertPiece(name, shape, (only, *read), into, transposed=transposed, interleaved=interleaved)


def _add_mxfp4(
    weights: Weights,
    name: str,
    shape: tuple[int, int, int],
    experts: range,
    rows: slice,
    blocks: slice,
    *,
    interleaved: bool = False,
) -> MXFP4Weight:
    """Add the rank's experts, rows and blocks of columns of the matrices [N, F, D] to `weights`."""
    n, features, columns = shape
    num_blocks = columns // MXFP4_BLOCK
    size = len(experts), len(range(features)[rows]), len(range(num_blocks)[blocks])
    data = torch.zeros(*size[:2], size[2] * MXFP4_BLOCK // 2, dtype=torch.uint8, device=weights.device)
    scales = torch.zeros(*size, dtype=torch.uint8, device=weights.device)
    whole = n, features, num_blocks
    of_data = _pieces(f"{name}_blocks", (*whole, MXFP4_BLOCK // 2), experts, (rows, blocks), interleaved=interleaved)
    weights.append(MXFP4Data(data, tuple(of_data)))
    of_scales = _pieces(f"{name}_scales", whole, experts, (rows, blocks), interleaved=interleaved)
    weights.append(MXFP4Scales(scales, tuple(of_scales)))
    return MXFP4Weight(data, scales)
