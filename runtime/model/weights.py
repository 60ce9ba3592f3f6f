"""Weights that declare their shards, and a generic loader.

A layer adds a tensor of its rank's size to `Weights` and declares, piece by piece, the parts of checkpoint tensors that
fill it. The loader reads exactly those parts: a rank neither reads nor holds the shards of others.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.arguments import FP8Weight
from .quantization import Quantization
from .tensor_files import HEAD, STORED_DTYPES, TensorFiles, check_shapes, format_names, not_finite

log = logging.getLogger(__name__)
ALL = slice(None)
KV_SCALES = (".k_scale", ".v_scale")  # scales of the KV cache; see kv_scales.py
UNUSED_SCALES = (".input_scale", ".output_scale", ".q_scale")  # scales of activations
DUMMY_DEVIATION = 0.02  # standard deviation of random weights


@dataclass(frozen=True)
class Piece:
    """A part of a checkpoint tensor: `weight[into] = checkpoint[name][read]`."""

    name: str
    shape: tuple[int, ...]  # shape of the whole tensor in the checkpoint
    read: tuple[slice, ...] = (ALL,)
    into: tuple[int | slice, ...] = (ALL,)
    offset: float = 0.0  # is added
    pairs: int = 0  # the rows are heads of this size, of which even rows are to come first, then the odd ones

    def value(self, tensor: Any) -> Tensor:
        """Return the part of a slice of safetensors."""
        part = self.ordered(tensor[self.read])
        return part.float() + self.offset if self.offset else part

    def ordered(self, rows: Tensor) -> Tensor:
        """Return the rows that were read in the order in which the weight has them."""
        if not self.pairs:
            return rows
        ordered: Tensor = rows.unflatten(0, (-1, self.pairs // 2, 2)).transpose(1, 2).flatten(0, 2)
        return ordered

    def shape_in(self, tensors: TensorFiles) -> tuple[int, ...]:
        """Return the shape that the tensor must have in these files."""
        return self.shape


@dataclass(frozen=True)
class Weight:
    """One rank's tensor and the pieces that fill it."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    is_norm: bool = False
    ignored: tuple[str, ...] = ()  # checkpoint tensors that repeat this one, or are not needed

    @property
    def stored_dtypes(self) -> tuple[str, ...]:
        """The dtypes that the checkpoint may have for this weight, as safetensors names them."""
        return ("F8_E4M3",) if self.tensor.dtype == torch.float8_e4m3fn else STORED_DTYPES

    def fill(self, tensors: TensorFiles) -> None:
        """Copy the pieces from slices of safetensors."""
        for piece in self.pieces:
            self.tensor[piece.into].copy_(piece.value(tensors[piece.name]))

    def extremes(self, part: Tensor) -> Tensor:
        """Return the least and the greatest number of a part of the tensor in float64; NaN if any is not finite."""
        return _extremes(part)

    def fill_dummy(self, part: Tensor, generator: torch.Generator) -> None:
        """Fill a piece's part of the tensor with random numbers, or with ones for a norm."""
        part.fill_(1.0) if self.is_norm else part.normal_(0.0, DUMMY_DEVIATION, generator=generator)


class Weights(list[Weight]):
    """The weights of one rank, in the order of its layers.

    batch_invariant     of their GEMMs, as --deterministic asks for
    zero_centred_norms  the checkpoint has the weights of norms less 1
    unused              beginnings of names in the checkpoint that no layer uses
    of_other_ranks      modules of which this rank has nothing: whole experts of other ranks
    fp8                 the FP8 matrices [F, D] of linear layers; their tensors are weights, too
    linear              of the other ones, the last of each shape; by shape, and whether the result is gated
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        quantization: Quantization | None = None,
        zero_centred_norms: bool = False,
        unused: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.unused, self.of_other_ranks = unused, set[str]()
        self.dtype, self.device, self.batch_invariant = dtype, device, batch_invariant
        self.quantization, self.zero_centred_norms = quantization, zero_centred_norms
        self.fp8: list[FP8Weight] = []
        self.linear: dict[tuple[torch.Size, bool], Tensor] = {}

    def add(
        self,
        shape: Sequence[int],
        pieces: Iterable[Piece],
        *,
        is_norm: bool = False,
        is_zero_centred: bool = True,
        ignored: tuple[str, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a new tensor of this shape; it is zero, and parts that no piece fills stay zero.

        is_zero_centred  False for a norm whose checkpoint has its weight as it is, also with zero_centred_norms
        dtype            None for that of the model
        """
        if is_norm and self.zero_centred_norms and is_zero_centred:
            pieces = [replace(piece, offset=1.0) for piece in pieces]
        tensor = torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)
        self.append(Weight(tensor, tuple(pieces), is_norm, ignored))
        return tensor


def load_weights(weights: Weights, folder: str | Path) -> None:
    """Fill the weights from the safetensors files of `folder`, reading only the slices they declare.

    Raises ValueError naming the tensors that are missing, unexpected, of another shape, no floating-point numbers, or
    not finite, and for a folder without safetensors or a file that cannot be read.
    """
    with ExitStack() as stack:
        tensors = TensorFiles(Path(folder), "pt", stack)
        check_files(weights, tensors)
        if unused := _unused_scales(weights, tensors):
            log.info(
                "weights: scales of activations are not used (%s): they are quantized by their own values",
                format_names(unused),
            )
        for weight in weights:
            weight.fill(tensors)
        _check_finite(weights, tensors)


def check_files(weights: Weights, tensors: TensorFiles) -> None:
    """Raise ValueError unless the files have the weights' tensors, and no others, with their shapes and dtypes."""
    ignored = {name for weight in weights for name in weight.ignored}
    if HEAD in ignored:
        tensors.use_tied_head()
    ignored |= {name for name in tensors if name.startswith(weights.unused) or name.endswith(KV_SCALES)}
    ignored |= set(_unused_scales(weights, tensors))
    ignored |= {name for name in tensors if name.rpartition(".")[0] in weights.of_other_ranks}
    expected = {piece.name: piece.shape_in(tensors) for weight in weights for piece in weight.pieces}
    check_shapes(expected, tensors, ignored, stored_dtypes(weights))
    _check_dtypes(weights, tensors)


def _unused_scales(weights: Sequence[Weight], tensors: TensorFiles) -> list[str]:
    """Return the scales of activations in the files of FP8 weights."""
    if not any(weight.tensor.dtype == torch.float8_e4m3fn for weight in weights):
        return []
    return sorted(name for name in tensors if name.endswith(UNUSED_SCALES))


def fill_dummy(weights: Sequence[Weight]) -> None:
    """Fill the weights with random numbers: normal with deviation DUMMY_DEVIATION, ones for norms.

    The seed is hashed from the part that a piece reads: shards differ, and replicated tensors are equal on all ranks.
    """
    for weight in weights:
        for piece in weight.pieces:
            part = weight.tensor[piece.into]
            seed = zlib.crc32(f"{piece.name}{piece.read}".encode())
            generator = torch.Generator(part.device).manual_seed(seed)
            weight.fill_dummy(part, generator)


def stored_dtypes(weights: Sequence[Weight]) -> tuple[str, ...]:
    """Return the dtypes that the files of these weights may have, as safetensors names them."""
    return tuple(dict.fromkeys(dtype for weight in weights for dtype in weight.stored_dtypes))


def _check_dtypes(weights: Sequence[Weight], tensors: TensorFiles) -> None:
    """Raise ValueError naming 8-bit tensors in place of others, and the reverse."""
    wrong = []
    for weight in weights:
        allowed = weight.stored_dtypes
        dtypes = {piece.name: tensors[piece.name].get_dtype() for piece in weight.pieces}
        wrong += [
            f"{name} is {dtype} instead of {' or '.join(allowed)}"
            for name, dtype in dtypes.items()
            if dtype not in allowed
        ]
    if wrong:
        raise ValueError(
            f"{tensors.folder} does not fit its quantization_config: {format_names(wrong)}; use a checkpoint"
            " in bfloat16, float16 or float8_e4m3fn as its config.json says"
        )


def _check_finite(weights: Sequence[Weight], tensors: TensorFiles) -> None:
    """Raise ValueError naming the tensors of which a part is not finite: one such number makes every output nonsense.

    Reads each weight once on its device, without a copy, and waits for the device once.
    """
    extremes = [weight.extremes(weight.tensor) for weight in weights if weight.tensor.numel()]
    if not extremes or bool(torch.stack(extremes).isfinite().all()):
        return
    pieces = ((weight, piece) for weight in weights for piece in weight.pieces)
    wrong = [p.name for weight, p in pieces if not weight.extremes(weight.tensor[p.into]).isfinite().all()]
    wrong = list(dict.fromkeys(wrong))
    dtype = str(weights[0].tensor.dtype).removeprefix("torch.")
    raise ValueError(f"{not_finite(tensors.path(wrong[0]), wrong)}, or use a dtype with a wider range than {dtype}")


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite; integers are finite."""
    is_float = tensor.is_floating_point() and tensor.numel() > 0
    return not is_float or bool(_extremes(tensor).isfinite().all())


def _extremes(tensor: Tensor) -> Tensor:
    """Return the least and the greatest number of a tensor in float64; NaN if it has any, of FP8 all or nothing."""
    if tensor.dtype != torch.float8_e4m3fn:
        return torch.stack(tensor.aminmax()).double()
    is_nan = (tensor.view(torch.int8).amax() == 0x7F) | (tensor.view(torch.uint8).amax() == 0xFF)  # no infinity
    return torch.where(is_nan, torch.nan, 0.0).double().expand(2)
