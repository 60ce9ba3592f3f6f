"""The checkpoint of a model: its folder on this host, downloaded if needed, and its safetensors files. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ...comm.message_text import first_line
from ..config import Config
from .hf_config import HFConfigReader
from .model_config import ModelConfig

MAX_NAMED = 8  # entries of a list in an error message
FILE_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


class NotFetched(ValueError):
    """A hub model that is not on this host yet; a start would fetch it."""


def checkpoint_folder(model: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Return the folder `model`, or the local copy of the hub model of that id, downloaded if `fetch` is set.

    Raises ValueError, in one line, if there is neither; NotFetched if a download would help.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"model folder {model} does not exist; give a folder with config.json, or a hub id like org/name"
        )
    from huggingface_hub import constants, snapshot_download  # costs 0.5 s: only for models from the hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=FILE_PATTERNS, local_files_only=not fetch)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not fetch:
            kind = ValueError if constants.HF_HUB_OFFLINE else NotFetched
            raise kind(f"{model} is no folder here and not downloaded yet; hf download {model}") from None
        # The hub's errors are chains of 70 lines, whose first line says it all.
        raise ValueError(
            f"{model} is no folder here and could not be fetched from the hub: {first_line(error)}"
        ) from None


def find_model(config: Config) -> tuple[Path, ModelConfig]:
    """Return the checkpoint's folder and its ModelConfig; raises ValueError if no rank could load it."""
    folder = checkpoint_folder(config.model, config.revision)
    model = ModelConfig.from_folder(folder)
    model.check_tensor_parallel(config.tensor_parallel_size)
    if config.load_format != "dummy":
        check_files(folder)  # before any rank is started
    return folder, model


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
