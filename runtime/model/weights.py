"""Weights that declare their shards, and a generic loader.

A layer adds a tensor of its rank's size to `Weights` and declares, piece by piece, the parts of checkpoint tensors that
fill it. The loader reads exactly those parts: a rank neither reads nor holds the shards of others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensor_files import TensorFiles, check_shapes, not_finite

ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint tensor: `weight[into] = checkpoint[name][read]`."""

    name: str
    shape: tuple[int, ...]  # shape of the whole tensor in the checkpoint
    read: tuple[slice, ...] = (ALL,)
    into: tuple[int | slice, ...] = (ALL,)
    pairs: int = 0  # the rows are heads of this size, of which even rows are to come first, then the odd ones

    def value(self, tensor: Any) -> Tensor:
        """Return the part of a slice of safetensors."""
        part: Tensor = tensor[self.read]
        if self.pairs:
            part = part.unflatten(0, (-1, self.pairs // 2, 2)).transpose(1, 2).flatten(0, 2)
        return part


@dataclass(frozen=True)
class Weight:
    """One rank's tensor and the pieces that fill it."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    is_norm: bool = False
    ignored: tuple[str, ...] = ()  # checkpoint tensors that repeat this one


class Weights(list[Weight]):
    """The weights of one rank, in the order of its layers; batch_invariant (--deterministic) is for their GEMMs."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool = False) -> None:
        super().__init__()
        self.dtype, self.device, self.batch_invariant = dtype, device, batch_invariant

    def add(
        self, shape: Sequence[int], pieces: Iterable[Piece], *, is_norm: bool = False, ignored: tuple[str, ...] = ()
    ) -> Tensor:
        """Return a new tensor of this shape; it is zero, and parts that no piece fills stay zero."""
        tensor = torch.zeros(*shape, dtype=self.dtype, device=self.device)
        self.append(Weight(tensor, tuple(pieces), is_norm, ignored))
        return tensor


def load_weights(weights: Sequence[Weight], folder: str | Path) -> None:
    """Fill the weights from the safetensors files of `folder`, reading only the slices they declare.

    Raises ValueError naming the tensors that are missing, unexpected, of another shape, no floating-point numbers, or
    not finite, and for a folder without safetensors or a file that cannot be read.
    """
    ignored = {name for weight in weights for name in weight.ignored}
    with ExitStack() as stack:
        tensors = TensorFiles(Path(folder), "pt", stack)
        expected = {piece.name: piece.shape for weight in weights for piece in weight.pieces}
        check_shapes(expected, tensors, ignored)
        for weight in weights:
            for piece in weight.pieces:
                weight.tensor[piece.into].copy_(piece.value(tensors[piece.name]))
        _check_finite(weights, tensors)


def fill_dummy(weights: Sequence[Weight]) -> None:
    """Fill the weights with random numbers: normal with deviation 0.02, ones for norms.

    The seed is hashed from the part that a piece reads: shards differ, and replicated tensors are equal on all ranks.
    """
    for weight in weights:
        for piece in weight.pieces:
            part = weight.tensor[piece.into]
            seed = zlib.crc32(f"{piece.name}{piece.read}".encode())
            generator = torch.Generator(part.device).manual_seed(seed)
            part.fill_(1.0) if weight.is_norm else part.normal_(0.0, 0.02, generator=generator)


def _check_finite(weights: Sequence[Weight], tensors: TensorFiles) -> None:
    """Raise ValueError naming the tensors of which a part is not finite: one such number makes every output nonsense.

    Reads each weight once on its device, without a copy, and waits for the device once: 16 GB take 10 ms on an H100.
    """
    extremes = [torch.stack(weight.tensor.aminmax()).double() for weight in weights if weight.tensor.numel()]
    if not extremes or bool(torch.stack(extremes).isfinite().all()):
        return
    parts = {piece.name: weight.tensor[piece.into] for weight in weights for piece in weight.pieces}
    wrong = [name for name, part in parts.items() if not part.isfinite().all()]
    dtype = str(weights[0].tensor.dtype).removeprefix("torch.")
    raise ValueError(f"{not_finite(tensors.path(wrong[0]), wrong)}, or use a dtype with a wider range than {dtype}")
