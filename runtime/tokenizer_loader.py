"""The start of transformers' tokenizer from the files of a checkpoint, which may be damaged, foreign or hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from ..comm.message_text import first_line
from .model.hf_config import HFConfigReader, exists
from .model.tokenizer_files import check_tokenizer_files
from .text_worker import encode, is_tokenizer_error

MAX_REASON = 300  # characters of another library's message


def load_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer; raises ValueError, in one line, for anything that keeps it from loading.

    Python code that the checkpoint brings is never run.
    """
    check_tokenizer_files(folder)
    from transformers import AutoTokenizer, __version__  # takes 1-2 s: only for processes that tokenize

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), config=_config_of_family(folder), trust_remote_code=False, local_files_only=True
        )
    except BaseException as error:
        if not is_tokenizer_error(error):
            raise
        versions = f"transformers {__version__} and tokenizers {tokenizers.__version__}"
        raise ValueError(
            f"no usable tokenizer in {folder}: {_reason(folder, error)}; fetch its files again, or update {versions}"
        ) from error


def check_backend(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Raise ValueError for a tokenizer that has loaded but cannot encode.

    Without any file of a tokenizer, transformers makes one of special tokens alone for some families.
    """
    if backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
        raise ValueError(f"the tokenizer in {folder} has no tokens but added ones; fetch tokenizer.json again")
    try:
        encode(backend, "a")
    except ValueError as error:
        raise ValueError(f"no usable tokenizer in {folder}: tokenizer.json: {error}; fetch its files again") from error


def _reason(folder: Path, error: BaseException) -> str:
    """Return the file that keeps the tokenizer from loading, and why, in one line."""
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    file = folder / "tokenizer.json"
    if not exists(file):
        return f"no tokenizer.json, and {kind}{' '.join(str(error).split())[:MAX_REASON]}"
    try:
        tokenizers.Tokenizer.from_file(str(file))
    except Exception as cause:  # noqa: BLE001 - the library raises plain Exception
        return f"tokenizer.json: {first_line(cause)[:MAX_REASON]}"
    return f"tokenizer_config.json: {kind}{first_line(error)[:MAX_REASON]}"


def _config_of_family(folder: Path) -> Any:
    """Return a default config of the checkpoint's model type, by which transformers chooses the tokenizer's class.

    transformers would read config.json itself: it runs into fields that have nothing to do with the tokenizer.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    path = folder / "config.json"
    fields = HFConfigReader.from_file(path) if exists(path) else HFConfigReader({})
    kind = fields.text("model_type", "")
    config = CONFIG_MAPPING[kind]() if kind in CONFIG_MAPPING else PreTrainedConfig()
    if "tokenizer_class" in fields:
        config.tokenizer_class = fields.text("tokenizer_class")
    return config
