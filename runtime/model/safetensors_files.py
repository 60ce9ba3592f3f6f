"""The safetensors files of a checkpoint: which they are, and whether they can be read. It needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from .hf_config import HFConfigReader

MAX_NAMED = 8  # of what an error lists


def check_files(folder: str | Path) -> list[Path]:
    """Open every safetensors file of a checkpoint; ValueError naming the first that is missing, corrupt or cut."""
    paths = checkpoint_files(Path(folder))
    for path in paths:
        with open_file(path, "np"):
            pass
    return paths


def checkpoint_files(folder: Path) -> list[Path]:
    """The files named by the index; else model.safetensors; else every *.safetensors there is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = HFConfigReader.from_file(index).nested("weight_map")
        names = sorted({weight_map.text(tensor) for tensor in weight_map.values})
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {listed(absent)} named in {index.name}; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights at all"]
        raise ValueError(
            f"{folder} has no *.safetensors ({listed(others)}); save the checkpoint as safetensors, "
            "or try the runtime without it with load_format='dummy'"
        )
    return files


def open_file(path: Path, framework: Literal["pt", "np"]) -> Any:
    """The open file, whose tensors will be torch's or numpy's; ValueError where it cannot be read."""
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or incomplete ({error}); fetch the file again") from error


def listed(names: Sequence[str]) -> str:
    """The first MAX_NAMED, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
