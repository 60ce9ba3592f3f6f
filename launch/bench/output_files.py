"""A check of the files that a benchmark writes, made before it starts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def require_outputs(*files: Path | None, plot: Path | None = None) -> None:
    """Raise ValueError if the folder of a file does not exist, or if matplotlib is missing for the plot."""
    for path in (*files, plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib")
