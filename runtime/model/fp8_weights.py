"""FP8 matrices of one rank: their data and scales as weights, loaded, quantized while loading, or random.

A rank's shard may begin and end inside the blocks of the checkpoint. Then a row of scales stands for fewer rows, the
scales of the shard's blocks are repeated, and the first block of columns is a part of one. No weight changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.arguments import FP8Choice, FP8Weight, Matrix
from .quantization import BLOCK, Quantization, ScaleGrid
from .tensor_files import STORED_DTYPES, TensorFiles
from .weights import DUMMY_DEVIATION, Piece, Weight, Weights

FP8_MAX = 448.0  # the maximum of float8_e4m3fn
DUMMY_MAGNITUDE = 100.0  # deviation of random FP8 numbers


def add_matrix(weights: Weights, shape: Sequence[int], pieces: Iterable[Piece], *, gated: bool = False) -> Matrix:
    """Add a matrix [F, D] or [N, F, D] to `weights`; return its tensor, or an FP8Weight if its modules are quantized.

    The pieces are rows and columns of tensors named `<module>.weight`. `gated` tells the choice of a GEMM what it ends
    with. Raises ValueError if only some modules are FP8.
    """
    pieces, quantization = tuple(pieces), weights.quantization
    modules = sorted({module_of(piece) for piece in pieces})
    if quantization is None or not quantization.covers_all(modules):
        tensor = weights.add(shape, pieces)
        if len(shape) == 2:
            weights.linear[tensor.shape, gated] = tensor
        return tensor
    grid = grid_of(quantization, pieces, shape[-1])
    data = torch.zeros(*shape, dtype=torch.float8_e4m3fn, device=weights.device)
    scales = torch.zeros(*shape[:-2], *grid.shape(shape[-2], shape[-1]), dtype=torch.float32, device=weights.device)
    if quantization.online:
        weights.append(QuantizedWeight(data, pieces, scales=scales))
        weights.append(ScaleWeight(scales, ()))
    else:
        weights.append(FP8Data(data, pieces))
        weights.append(ScaleWeight(scales, tuple(_scale_piece(quantization, grid, piece) for piece in pieces)))
    layout = grid.rows, grid.columns, grid.first
    kind = data.shape, layout, gated
    alike = [other for other in weights.fp8 if (other.shape, other[2:5], other.choice.gated) == kind]
    matrix = FP8Weight(data, scales, *layout, alike[0].choice if alike else FP8Choice(gated=gated))
    if len(shape) == 2:
        weights.fp8.append(matrix)
    return matrix


def module_of(piece: Piece) -> str:
    """Return the module of a piece of `<module>.weight`."""
    return piece.name.removesuffix(".weight")


def grid_of(quantization: Quantization, pieces: Sequence[Piece], columns: int) -> ScaleGrid:
    """Return the scales that fit all pieces of a matrix."""
    bounds = []
    for piece in pieces:
        (first, _), (start, _) = _ranges(piece)[0], _rows_into(piece)
        bounds += [start, first - start] if quantization.granularity == "block" else [start]
        bounds += quantization.bounds_of_pairs(piece.pairs) if piece.pairs else []
    return quantization.grid(bounds, columns, _ranges(pieces[0])[1][0])


def _ranges(piece: Piece) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first and the end row, and the first and the end column, that a piece reads."""
    reads = (*piece.read, slice(None), slice(None))[:2]
    (first, stop, _), (left, right, _) = (r.indices(n) for r, n in zip(reads, piece.shape, strict=True))
    return (first, stop), (left, right)


def _rows_into(piece: Piece) -> tuple[int, int]:
    """Return the first and the end row of the rank's matrix that a piece fills."""
    first, stop = _ranges(piece)[0]
    slices = [part for part in piece.into if isinstance(part, slice)]
    start = slices[0].start or 0 if slices else 0
    return start, start + stop - first


def _scale_piece(quantization: Quantization, grid: ScaleGrid, piece: Piece) -> ScalePiece:
    (first, _), (left, right) = _ranges(piece)
    start, stop = _rows_into(piece)
    source = piece.ordered(torch.arange(first, first + stop - start)).tolist()[:: grid.rows]
    rows, columns = piece.shape
    name = f"{module_of(piece)}.{quantization.scale_name}"
    into: tuple[int | slice, ...] = (
        *(part for part in piece.into if isinstance(part, int)),
        slice(start // grid.rows, start // grid.rows + len(source)),
    )
    if quantization.granularity == "tensor":
        return ScalePiece(name=name, shape=(1, 1), into=into, rows=(0,) * len(source), columns=slice(0, 1))
    if quantization.granularity == "row":
        return ScalePiece(name=name, shape=(rows, 1), into=into, rows=tuple(source), columns=slice(0, 1))
    blocks = tuple(row // BLOCK for row in source)
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    return ScalePiece(name=name, shape=shape, into=into, rows=blocks, columns=slice(left // BLOCK, -(-right // BLOCK)))


@dataclass(frozen=True, kw_only=True)
class ScalePiece(Piece):
    """Scales of a checkpoint: rows, repeated or not, and columns of a tensor whose shape is `shape` apart from ones."""

    rows: tuple[int, ...]
    columns: slice

    def shape_in(self, tensors: TensorFiles) -> tuple[int, ...]:
        """Return the tensor's own shape if it is equal apart from dimensions of 1, which formats write differently."""
        if self.name not in tensors:
            return self.shape
        shape = tuple(tensors[self.name].get_shape())
        return shape if [n for n in shape if n != 1] == [n for n in self.shape if n != 1] else self.shape

    def value(self, tensor: Any) -> Tensor:
        scales: Tensor = tensor[...]
        return scales.float().reshape(self.shape)[list(self.rows), self.columns]


@dataclass(frozen=True)
class FP8Data(Weight):
    """The FP8 numbers of a matrix."""

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        noise = torch.empty(part.shape, dtype=torch.bfloat16, device=part.device)
        part.copy_(noise.normal_(0.0, DUMMY_MAGNITUDE, generator=generator).clamp_(-FP8_MAX, FP8_MAX))


@dataclass(frozen=True)
class ScaleWeight(Weight):
    """The scales of a matrix."""

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        part.fill_(DUMMY_DEVIATION / DUMMY_MAGNITUDE)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(FP8Data):
    """A matrix that is quantized while it is loaded, one piece after the other, with one scale for each row.

    Whole rows of the checkpoint are read, so that any number of ranks gives the same numbers.
    """

    scales: Tensor  # [F, 1] or [N, F, 1]

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        return STORED_DTYPES

    def fill(self, tensors: TensorFiles) -> None:
        for piece in self.pieces:
            (first, stop), (left, right) = _ranges(piece)
            numbers, scales = quantize_rows(tensors[piece.name][first:stop].to(self.tensor.device))
            self.tensor[piece.into].copy_(piece.ordered(numbers[:, left:right]))
            self.scales[piece.into].copy_(piece.ordered(scales))

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        super().fill_dummy(part, generator)
        self.scales.fill_(DUMMY_DEVIATION / DUMMY_MAGNITUDE)


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the FP8 numbers [F, D] of a matrix and the scale of each row, [F, 1] float32: its maximum / 448."""
    wide = matrix.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * FP8_MAX) / FP8_MAX
    return (wide / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales
