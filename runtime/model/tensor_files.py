"""The safetensors files of a checkpoint as one mapping from names to tensors. Needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from .fused_experts import matrices_of_experts
from .hf_config import HFConfigReader, check_regular, exists

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
# Tensors of a model that also sees images; its text part is below `language_model`.
IMAGE_PARTS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.", "model.visual.",
)  # fmt: skip
UNUSED_PARTS = (*IMAGE_PARTS, "mtp.", "model.mtp_")  # mtp: multi-token prediction, for speculative decoding
# Last parts of the names of tensors that follow from the config: rotary frequencies and tables, positions and masks.
BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "position_ids", "masked_bias", "causal_mask")
MASK = "attn.bias"  # if its numbers are integers or booleans
MAX_NAME_BYTES = 255  # as file systems have it
MAX_NAMED = 8  # entries of a list in an error message
COMPARED_BYTES = 16 * 2**20  # compared at once
# The dtypes of weights, with the unsigned integer of their size and the bits of the exponent in it, which are all set
# in NaN and infinity: NumPy has no bfloat16.
EXPONENTS = {
    "F64": ("<u8", np.uint64(0x7FF0000000000000)),
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
}
STORED_DTYPES = tuple(EXPONENTS)  # of weights that are not quantized
FP8_DTYPES = (*STORED_DTYPES, "F8_E4M3")


class TensorFiles(Mapping[str, Any]):
    """The tensors of all files, by name, as safetensors slices: only what is indexed is read.

    Of a model that also sees images, the tensors of its text part, under the names of a model of text alone. Experts
    that share a tensor have one for each, under the names of a checkpoint that stores them so.
    Open until `stack` closes. Raises ValueError naming the file that is missing, cannot be read, or has a tensor that
    another one has, too.
    """

    def __init__(self, folder: Path, framework: Literal["pt", "np"], stack: ExitStack) -> None:
        self.folder = folder
        self._slices: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._stored_names: dict[str, str] = {}
        weight_map = _weight_map(folder)
        for path in _paths(folder, weight_map):
            file = stack.enter_context(_open(path, framework))
            for stored in file.keys():  # noqa: SIM118 - not a mapping
                if weight_map.get(stored, path.name) != path.name or stored.startswith(UNUSED_PARTS):
                    continue  # the index takes this one from another file, or it is not used
                name = stored.replace("language_model.", "")
                self._stored_names[name] = stored
                if name in self._paths:
                    raise ValueError(
                        f"{path} and {self._paths[name].name} both have {name}; remove one of the files, or add {INDEX}"
                    )
                self._slices[name], self._paths[name] = file.get_slice(stored), path
        for name, fused, part in list(matrices_of_experts(self._slices)):
            self._slices[name], self._paths[name] = part, self._paths[fused]
            self._slices.pop(fused, None)

    def __getitem__(self, name: str) -> Any:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def paths(self) -> list[Path]:
        """The files that have tensors."""
        return sorted(set(self._paths.values()))

    def path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self._paths[name]

    def use_tied_head(self) -> None:
        """Take the output head of a tied model for its embedding, if the files have the head only."""
        if HEAD in self and EMBEDDING not in self:
            self._slices[EMBEDDING], self._paths[EMBEDDING] = self._slices.pop(HEAD), self._paths.pop(HEAD)
            self._stored_names[EMBEDDING] = self._stored_names.pop(HEAD)

    def is_zero(self, name: str) -> bool:
        """Return whether all bytes of a tensor are zero; reads all of it."""
        return not self._bytes(name).any()

    def is_buffer(self, name: str) -> bool:
        """Return whether a tensor follows from the config, so that it is not needed."""
        is_mask = name.endswith(MASK) and self[name].get_dtype() not in FP8_DTYPES
        return is_mask or name.rpartition(".")[2] in BUFFERS

    def equal(self, a: str, b: str) -> bool:
        """Return whether two tensors have the same dtype, shape and bytes."""
        slices = self[a], self[b]
        if slices[0].get_dtype() != slices[1].get_dtype() or slices[0].get_shape() != slices[1].get_shape():
            return False
        left, right = self._bytes(a), self._bytes(b)
        starts = range(0, len(left), COMPARED_BYTES)
        return all(np.array_equal(left[n : n + COMPARED_BYTES], right[n : n + COMPARED_BYTES]) for n in starts)

    def is_finite(self, name: str) -> bool:
        """Return whether no number of a floating-point tensor is NaN or infinite; reads all of it."""
        dtype, exponent = EXPONENTS[self[name].get_dtype()]
        bits = np.frombuffer(self._bytes(name).tobytes(), dtype)
        return bool(np.all(bits & exponent != exponent))

    def _bytes(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, mapped from its file."""
        path = self._paths[name]
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            start, end = json.loads(file.read(header_size))[self._stored_names[name]]["data_offsets"]
        return np.memmap(path, np.uint8, "r", 8 + header_size)[start:end]


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    tensors: TensorFiles,
    ignored: Set[str] | None = None,
    dtypes: Collection[str] = STORED_DTYPES,
) -> None:
    """Raise ValueError naming the tensors that are missing or of another shape, and all that hold no weights' dtype.

    Buffers and biases of zeros are not needed. Others than the expected tensors must be `ignored`.

    dtypes   those that the checkpoint's weights may have
    ignored  the only names that may be in the files beside the expected ones; None allows all names
    """
    shapes = {name: tuple(tensors[name].get_shape()) for name in expected if name in tensors}
    others = [name for name in tensors if name not in expected]
    redundant = {name for name in others if tensors.is_buffer(name)}
    stored = {name: tensors[name].get_dtype() for name in tensors if name not in redundant}

    def is_needless(name: str) -> bool:
        is_known = ignored is None or name in ignored or name in redundant
        return is_known or (name.endswith(".bias") and tensors.is_zero(name))

    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in others if not is_needless(name)],
        "misshapen": [
            f"{name} {list(shape)} instead of {list(expected[name])}"
            for name, shape in shapes.items()
            if shape != expected[name]
        ],
        f"of a dtype other than {', '.join(dtypes)}": [
            f"{name} {dtype}" for name, dtype in stored.items() if dtype not in dtypes
        ],
    }
    texts = [f"{len(names)} {kind}: {format_names(names)}" for kind, names in problems.items() if names]
    if texts:
        raise ValueError(f"{tensors.folder} does not fit its config.json, {'; '.join(texts)}; use matching files")


def check_finite(names: Sequence[str], tensors: TensorFiles) -> None:
    """Raise ValueError naming the tensors with a number that is not finite; reads all of them."""
    wrong = [name for name in names if not tensors.is_finite(name)]
    if wrong:
        raise ValueError(not_finite(tensors.path(wrong[0]), wrong))


def not_finite(path: Path, names: Sequence[str]) -> str:
    """Return the message about tensors of which one number makes every output nonsense."""
    return f"{path}: NaN or infinite numbers in {format_names(names)}; fetch the file again"


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor as the index has it; empty without an index."""
    index = folder / INDEX
    if not exists(index):
        return {}
    weight_map = HFConfigReader.from_file(index).nested("weight_map")
    names = {tensor: weight_map.text(tensor) for tensor in weight_map.values}
    if not names:
        raise ValueError(f"{index} has an empty weight_map; fetch the file again")
    wrong = [name for name in names.values() if not _is_file_name(name)]
    if wrong:
        raise ValueError(f"{index} names {wrong[0][:80]!r}, it must name files of its own folder; fetch it again")
    return names


def _is_file_name(name: str) -> bool:
    """Return whether a name can be that of a file in the checkpoint's folder, and stands in one line."""
    return name.isprintable() and 0 < len(os.fsencode(name)) <= MAX_NAME_BYTES and Path(name).name == name


def _paths(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """Return the files named by the index; else model.safetensors; else every *.safetensors in the folder."""
    if weight_map:
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not exists(folder / name)]
        if absent:
            raise ValueError(f"{folder} lacks {format_names(absent)} named in {INDEX}; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if exists(single) else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights at all"]
        raise ValueError(
            f"{folder} has no *.safetensors ({format_names(others)}); save the checkpoint as safetensors, "
            "or try the runtime without it with load_format='dummy'"
        )
    return files


def _open(path: Path, framework: Literal["pt", "np"]) -> Any:
    """Open a file for torch or NumPy tensors; raises ValueError if it cannot be read."""
    check_regular(path)
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or incomplete ({error}); fetch the file again") from error


def format_names(names: Sequence[str]) -> str:
    """Return the first MAX_NAMED names, and the number of others, as text."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
