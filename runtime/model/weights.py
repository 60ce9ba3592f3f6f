"""Weights that declare their shards, and a generic loader.

A layer adds a tensor of its rank's size to `Weights` and declares, piece by piece, the parts of checkpoint tensors that
fill it. The loader reads exactly those parts: a rank neither reads nor holds the shards of others.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import checkpoint_files, format_names, open_file

ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint tensor: `weight[into] = checkpoint[name][read]`."""

    name: str
    shape: tuple[int, ...]  # shape of the whole tensor in the checkpoint
    read: tuple[slice, ...] = (ALL,)
    into: tuple[int | slice, ...] = (ALL,)


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

    Raises ValueError naming the tensors that are missing, unexpected or of another shape, and for a folder without
    safetensors or a file that cannot be read.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in checkpoint_files(Path(folder)):
            file = stack.enter_context(open_file(path, "pt"))
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check(weights, {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}, Path(folder))
        for weight in weights:
            for piece in weight.pieces:
                weight.tensor[piece.into].copy_(tensors[piece.name][piece.read])


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


def _check(weights: Sequence[Weight], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    expected = {piece.name: piece.shape for weight in weights for piece in weight.pieces}
    ignored = {name for weight in weights for name in weight.ignored}
    # Old checkpoints also hold rotary frequencies, which the config determines.
    ignored |= {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and name not in ignored]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {format_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{folder} does not fit its config.json, {'; '.join(problems)}; use matching files")
