"""The safetensors files of a checkpoint: find and open them. This module needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from .hf_config import HFConfigReader

MAX_NAMED = 8  # entries of a list in an error message


def check_files(folder: str | Path) -> list[Path]:
    """Open every safetensors file of a checkpoint; raises ValueError naming the first that cannot be read."""
    paths = checkpoint_files(Path(folder))
    for path in paths:
        with open_file(path, "np"):
            pass
    return paths


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files named by the index; else model.safetensors; else every *.safetensors in the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = HFConfigReader.from_file(index).nested("weight_map")
        names = sorted({weight_map.text(tensor) for tensor in weight_map.values})
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {format_names(absent)} named in {index.name}; fetch the missing files")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin")) or ["no weights at all"]
        raise ValueError(
            f"{folder} has no *.safetensors ({format_names(others)}); save the checkpoint as safetensors, "
            "or try the runtime without it with load_format='dummy'"
        )
    return files


def open_file(path: Path, framework: Literal["pt", "np"]) -> Any:
    """Open a file for torch or NumPy tensors; raises ValueError if it cannot be read."""
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is corrupt or incomplete ({error}); fetch the file again") from error


def format_names(names: Sequence[str]) -> str:
    """Return the first MAX_NAMED names, and the number of others, as text."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
