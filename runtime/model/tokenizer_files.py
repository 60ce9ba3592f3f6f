"""Checks of a checkpoint's tokenizer files, and the tokenizer's own EOS token. Needs neither torch nor transformers.

transformers trusts these files: it would wait for ever at a FIFO, and answers a wrong type with a traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from .hf_config import HFConfigReader, exists

SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
OBJECTS = (SETTINGS, SPECIAL_TOKENS, "added_tokens.json", "vocab.json", "chat_template.json")  # JSON objects
OTHERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "merges.txt", "vocab.txt", "chat_template.jinja")
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
Vocab = dict[str, int] | list[tuple[str, float]]


class AddedToken(msgspec.Struct):
    """An entry of `added_tokens` in tokenizer.json."""

    id: int
    content: str


class AddedTokens(msgspec.Struct):
    """The part of tokenizer.json that nearly always has the EOS token; the rest is skipped."""

    added_tokens: list[AddedToken] = []


class PlainModel(msgspec.Struct):
    """The model of a tokenizer.json: by token its id, or a list of tokens with scores in the order of their ids."""

    vocab: Vocab = {}


class PlainTokens(msgspec.Struct):
    """The tokens of tokenizer.json that were not added to its model."""

    model: PlainModel = msgspec.field(default_factory=PlainModel)


def check_tokenizer_files(folder: Path) -> None:
    """Raise ValueError, in one line, for a tokenizer file that cannot be read or a field of another type."""
    for name in OTHERS:
        exists(folder / name)
    readers = {name: HFConfigReader.from_file(folder / name) for name in OBJECTS if exists(folder / name)}
    for name in (SETTINGS, SPECIAL_TOKENS):
        if name in readers:
            _check_fields(readers[name])


def eos_token_id(folder: Path) -> int | None:
    """Return the id of the tokenizer's EOS token; None without one, or if tokenizer.json does not have it."""
    text = _eos_text(folder)
    path = folder / "tokenizer.json"
    if text is None or not exists(path):
        return None
    content = path.read_bytes()
    added: AddedTokens = _decode(content, AddedTokens, path)
    for token in added.added_tokens:
        if token.content == text:
            return token.id
    vocab: Vocab = _decode(content, PlainTokens, path).model.vocab
    if isinstance(vocab, dict):
        return vocab.get(text)
    return next((i for i, (token, _) in enumerate(vocab) if token == text), None)


def tokenizer_of_size(path: Path, vocab_size: int) -> str:
    """Return a tokenizer.json as JSON, without the added tokens that a model with vocab_size logits cannot sample.

    Returns its path if there are none. Raises ValueError if it is no tokenizer, or that of a larger model: libraries
    make tables of all ids up to the highest one.
    """
    content = path.read_bytes()
    vocab: Vocab = _decode(content, PlainTokens, path).model.vocab
    highest = max(vocab.values(), default=0) if isinstance(vocab, dict) else len(vocab) - 1
    if highest >= vocab_size:
        raise ValueError(f"{path} has token ids up to {highest}, but the model has ids 0 to {vocab_size - 1}")
    added: AddedTokens = _decode(content, AddedTokens, path)
    if all(token.id < vocab_size for token in added.added_tokens):
        return str(path)
    tokenizer = msgspec.json.decode(content)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < vocab_size]
    return msgspec.json.encode(tokenizer).decode()


def _eos_text(folder: Path) -> str | None:
    """Return the EOS token of tokenizer_config.json, else that of special_tokens_map.json, as older versions wrote."""
    for name in (SETTINGS, SPECIAL_TOKENS):
        fields = HFConfigReader.from_file(folder / name) if exists(folder / name) else HFConfigReader({}, name)
        _check_fields(fields)
        if "eos_token" in fields.values:
            token: str | dict[str, str] | None = fields.values["eos_token"]
            return token["content"] if isinstance(token, dict) else token
    return None


def _check_fields(fields: HFConfigReader) -> None:
    """Check the fields that transformers reads; raises ValueError naming the first of a wrong type."""
    for name in TOKENS:
        if name in fields:
            is_object = isinstance(fields.values[name], dict)
            (fields.nested(name).text("content") if is_object else fields.text(name))
    decoder = fields.nested("added_tokens_decoder")
    for i in decoder.values:
        if not i.isdecimal():
            raise ValueError(f"{decoder.source} has the key {i[:40]!r}, it must be a token id; fetch the file again")
        decoder.nested(i).text("content")
    fields.text("tokenizer_class", "")
    for name in ("padding_side", "truncation_side"):
        if fields.text(name, "left") not in ("left", "right"):
            raise ValueError(f"{fields.source}: {name} must be 'left' or 'right'; fetch the file again")
    if not isinstance(fields.values.get("chat_template"), (list, dict)):  # one, or several by name
        fields.text("chat_template", "")
    for name in ("auto_map", "extra_special_tokens"):
        if not isinstance(fields.values.get(name), list):  # old versions of transformers wrote lists
            fields.nested(name)


def _decode(content: bytes, kind: Any, path: Path) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no tokenizer ({error}); fetch the file again") from error
