"""The bound of characters for each token: kept by texts of the longest tokens, and absent where text is dropped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.text_worker import encode
from lockstep.runtime.token_bounds import max_chars_per_token

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    " ", "  ", "a", "e\u0301", "u\u0308\u0304", "\u03b1\u0313\u0300\u0345", "\u1112\u1161\u11ab", "\ufdfa", "\u0130",
    "<tool>", "\U0001f600", "\t\n", "the", "\u0000", "\u200b", "\ud7ff", "\u2581", "\u00df",
]  # fmt: skip


def byte_level(normalizer: Any = None, **vocabulary: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate([*alphabet, "th", "the", "\u0120\u0120", "\u0120" * 4])}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "\u0120"), ("\u0120\u0120", "\u0120\u0120")]
    tokenizer = Tokenizer(models.BPE(words | vocabulary, merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(["<tool>"])
    return tokenizer


def with_byte_tokens(kind: str) -> Tokenizer:
    """A tokenizer as Llama 2's: white space becomes a visible character, and unknown characters become bytes."""
    words = [*BYTES, "<unk>", "\u2581", "\u2581\u2581", "a"]
    if kind == "Unigram":
        model: Any = models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 256, byte_fallback=True)
    else:
        vocabulary = {word: i for i, word in enumerate(words)}
        merges = [("\u2581", "\u2581")]
        model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


BOUNDED = {
    "the demo model": Tokenizer.from_file(str(Path(DEMO_MODEL) / "tokenizer.json")),
    "bytes": byte_level(),
    "bytes and NFC": byte_level(normalizers.NFC()),
    "bytes and NFKC": byte_level(normalizers.NFKC()),
    "bytes and lower case": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])),
    "byte tokens": with_byte_tokens("BPE"),
    "byte tokens and scores": with_byte_tokens("Unigram"),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_no_text_has_more_characters_than_its_tokens_allow(name: str) -> None:
    tokenizer, rng = BOUNDED[name], random.Random(name)
    bound = max_chars_per_token(tokenizer.to_str())
    assert bound is not None
    texts = [piece * 40 for piece in PIECES]
    texts += ["".join(rng.choices(PIECES, k=rng.randint(1, 60))) for _ in range(300)]
    for text in texts:
        assert len(text) <= bound * len(encode(tokenizer, text, add_special_tokens=False)), repr(text)


def test_bound_is_reached_by_the_longest_token() -> None:
    tokenizer = byte_level(word=300, **{"\u0120" * 8: 301})
    assert max_chars_per_token(tokenizer.to_str()) == 8
    demo = json.loads(BOUNDED["the demo model"].to_str())
    longest = max([*demo["model"]["vocab"], *(token["content"] for token in demo["added_tokens"])], key=len)
    assert max_chars_per_token(BOUNDED["the demo model"].to_str()) == len(longest)


def test_characters_that_the_normalizer_composes_are_counted() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, second, third = (chr(c) for c in (0xE1, 0xBE, 0x124))  # U+1F82 in UTF-8, as byte-level characters
    words = {token: i for i, token in enumerate([*alphabet, first + second, first + second + third])}
    tokenizer = Tokenizer(models.BPE(words, [(first, second), (first + second, third)]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "\u03b1\u0313\u0300\u0345"
    assert len(encode(tokenizer, text)) == 1
    assert max_chars_per_token(tokenizer.to_str()) == 4 * 3


def without(tokenizer: Tokenizer, part: str, value: Any) -> Tokenizer:
    setattr(tokenizer, part, value)
    return tokenizer


def rightmost() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace(Regex(" {2,}"), " ")),
        byte_level(normalizers.Replace("  ", "")),
        byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        byte_level(normalizers.Nmt()),
        byte_level(normalizers.BertNormalizer()),
        without(byte_level(), "pre_tokenizer", pre_tokenizers.Whitespace()),
        without(byte_level(), "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
        without(byte_level(), "pre_tokenizer", None),
        rightmost(),
        Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0}, [])),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=False)),
    ],
    ids=lambda tokenizer: str(json.loads(tokenizer.to_str())["normalizer"])[:40],
)
def test_tokenizers_that_drop_or_join_text_have_no_bound(tokenizer: Tokenizer) -> None:
    assert max_chars_per_token(tokenizer.to_str()) is None
