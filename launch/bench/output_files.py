"""A check of the files that a benchmark writes, made before it starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def require_outputs(*files: Path | None, plot: Path | None = None) -> None:
    """Raise ValueError for a file that cannot be written, or if matplotlib is missing for the plot."""
    for path in (*files, plot):
        if path is None:
            continue
        try:
            is_folder, has_folder, exists = path.is_dir(), path.parent.is_dir(), path.exists()
        except OSError as error:  # a name that is too long, or a folder that may not be read
            raise ValueError(f"cannot write {path}: {error.strerror}") from error
        if is_folder:
            raise ValueError(f"cannot write {path}: it is a folder; give a file")
        if not has_folder:
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
        if not os.access(path if exists else path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}: no permission")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib")


def require_in_folder(folder: Path, name: str) -> None:
    """Make a folder for the file `name`; raises ValueError if either cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from error
    require_outputs(folder / name)
