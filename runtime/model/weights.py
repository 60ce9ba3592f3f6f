"""Weights that say how they are sharded, and a loader that needs to know nothing else.

A layer asks `Weights` for a tensor of its rank's size and declares, piece by piece, which part of which checkpoint
tensor goes where in it. The loader reads exactly those parts: a rank never holds, nor reads, what belongs to another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .fields import Fields

ALL = slice(None)
MAX_NAMED = 8  # tensors of one kind that a CheckpointMismatch names


class CheckpointMismatch(ValueError):
    """The tensors of the checkpoint are not those that the config describes."""


@dataclass(frozen=True)
class Piece:
    """`weight[into] = checkpoint[name][read]`."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    read: tuple[slice, ...] = (ALL,)
    into: tuple[int | slice, ...] = (ALL,)


@dataclass(frozen=True)
class Weight:
    """One rank's tensor and what fills it."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    is_norm: bool = False
    ignored: tuple[str, ...] = ()  # checkpoint tensors that say the same again


class Weights(list[Weight]):
    """The weights of one rank, in the order in which its layers made them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device

    def add(
        self, shape: Sequence[int], pieces: Iterable[Piece], *, is_norm: bool = False, ignored: tuple[str, ...] = ()
    ) -> Tensor:
        """A new tensor of this shape, zero until it is loaded (what no piece fills stays zero)."""
        tensor = torch.zeros(*shape, dtype=self.dtype, device=self.device)
        self.append(Weight(tensor, tuple(pieces), is_norm, ignored))
        return tensor


def load_weights(weights: Sequence[Weight], folder: str | Path) -> None:
    """Fill the weights from the safetensors files of `folder`, reading only the slices they declare.

    Raises CheckpointMismatch naming the tensors that are missing, unexpected or of another shape, and ValueError for
    a folder without safetensors or a file that cannot be read.
    """
    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for path in _checkpoint_files(Path(folder)):
            file = stack.enter_context(_open(path))
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check(weights, {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}, Path(folder))
        for weight in weights:
            for piece in weight.pieces:
                weight.tensor[piece.into].copy_(tensors[piece.name][piece.read])


def check_files(folder: str | Path) -> list[Path]:
    """Open every safetensors file of a checkpoint; ValueError naming the first that is missing, corrupt or cut."""
    paths = _checkpoint_files(Path(folder))
    for path in paths:
        with _open(path):
            pass
    return paths


def fill_dummy(weights: Sequence[Weight]) -> None:
    """Random numbers instead of a checkpoint: normal with deviation 0.02, ones for norms.

    The seed is what a piece reads: ranks get different shards, and equal values where a tensor is replicated.
    """
    for weight in weights:
        for piece in weight.pieces:
            part = weight.tensor[piece.into]
            seed = zlib.crc32(f"{piece.name}{piece.read}".encode())
            generator = torch.Generator(part.device).manual_seed(seed)
            part.fill_(1.0) if weight.is_norm else part.normal_(0.0, 0.02, generator=generator)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files named by the index; else model.safetensors; else every *.safetensors there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = Fields.from_file(index).nested("weight_map")
        names = sorted({weight_map.text(tensor) for tensor in weight_map.values})
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {_listed(absent)} named in {index.name}; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights at all"]
        raise ValueError(
            f"{folder} has no *.safetensors ({_listed(others)}); save the checkpoint as safetensors, "
            "or try the runtime without it with load_format='dummy'"
        )
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or incomplete ({error}); fetch the file again") from error


def _check(weights: Sequence[Weight], found: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    expected = {piece.name: piece.shape for weight in weights for piece in weight.pieces}
    ignored = {name for weight in weights for name in weight.ignored}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected | dict.fromkeys(ignored) and not _is_buffer(name)]
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointMismatch(f"{folder} does not fit its config.json, {'; '.join(problems)}; use matching files")


def _is_buffer(name: str) -> bool:
    """Old checkpoints carry the rotary frequencies, which the config determines."""
    return name.endswith("rotary_emb.inv_freq")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
