"""The checkpoint of a model: from a folder or hub id to a folder on this host."""

from __future__ import annotations

import logging
from pathlib import Path

from ..comm.error_text import first_line
from .config import Config
from .model.model_config import ModelConfig
from .model.safetensors_files import check_files

log = logging.getLogger(__name__)
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
            raise kind(f"{model} is no folder here and not downloaded yet; hf download {model}") from error
        raise ValueError(
            f"{model} is no folder here and could not be fetched from the hub: {first_line(error)}"
        ) from error


def find_model(config: Config) -> tuple[Path, ModelConfig]:
    """Return the checkpoint's folder and its ModelConfig; raises ValueError if no rank could load it."""
    folder = checkpoint_folder(config.model, config.revision)
    model = ModelConfig.from_folder(folder)
    model.check_tensor_parallel(config.tensor_parallel_size)
    if config.load_format != "dummy":
        check_files(folder)  # before any rank is started
    return folder, model
