"""Checks of the files that a benchmark writes, made before it starts."""

from __future__ import annotations

from pathlib import Path


def require_folder(path: Path | None) -> None:
    """Raise ValueError if the folder of a file to be written does not exist."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib") from error
