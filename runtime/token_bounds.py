"""The most characters of a text that one of its tokens can stand for, by the parts of a tokenizer.

A text with more characters than that for each token of the context cannot fit, and need not be tokenized. Many
tokenizers have no such bound: they drop white space, accents or unknown characters, so a token has any length.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

# NFC and NFKC compose up to four characters into one: the longest canonical decomposition has four.
SHRINKING = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1, "ByteLevel": 1}
# These keep each character of the text.
KEEPING = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts", "FixedLength"}
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


def max_chars_per_token(tokenizer_json: str) -> int | None:
    """Return the bound for the tokenizer in a tokenizer.json; None if a token can stand for any number."""
    parts = json.loads(tokenizer_json)
    added, model = parts["added_tokens"], parts["model"]
    if any(token["lstrip"] or token["rstrip"] for token in added):  # with the white space beside it
        return None
    factor = _shrinkage(parts["normalizer"])
    if factor is None or not _keeps_characters(parts["pre_tokenizer"]) or not _has_all_bytes(parts):
        return None
    vocabulary = model["vocab"]  # Unigram has pairs of a token and its score
    tokens = vocabulary if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
    return factor * max(len(token) for token in [*tokens, *(token["content"] for token in added)])


def _shrinkage(normalizer: dict[str, Any] | None) -> int | None:
    """Return the most characters that become one; None without a bound."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factors = [_shrinkage(part) for part in normalizer["normalizers"]]
        return None if None in factors else math.prod(factor for factor in factors if factor is not None)
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return -(-len(pattern) // len(content)) if pattern and content else None
    return SHRINKING.get(kind)


def _keeps_characters(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_keeps_characters, pre_tokenizer["pretokenizers"]))
    if kind in ("Split", "Punctuation"):
        return bool(pre_tokenizer["behavior"] != "Removed")
    return kind in KEEPING


def _has_all_bytes(parts: dict[str, Any]) -> bool:
    """Return whether the model has a token for each byte: it then never drops or joins unknown characters."""
    model = parts["model"]
    if model["type"] == "Unigram":
        return bool(model.get("byte_fallback")) and BYTE_TOKENS.issubset(token for token, _ in model["vocab"])
    if model["type"] != "BPE":
        return False
    if model.get("byte_fallback"):
        return BYTE_TOKENS.issubset(model["vocab"])
    is_byte_level = _contains_byte_level(parts["normalizer"]) or _contains_byte_level(parts["pre_tokenizer"])
    return is_byte_level and set(ByteLevel.alphabet()).issubset(model["vocab"])


def _contains_byte_level(part: dict[str, Any] | None) -> bool:
    if part is None:
        return False
    nested = part.get("normalizers") or part.get("pretokenizers") or []
    return part["type"] == "ByteLevel" or any(map(_contains_byte_level, nested))
