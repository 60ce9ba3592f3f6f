"""Small tokenizers of every kind that checkpoints have, made by the `tokenizers` library.

Each has special tokens, an added token that is not special, and ids up to `PADDED` that mean nothing, as a vocabulary
that is padded to a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PADDED = 512
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "a",
    "▁a",
    "▁",
    "▁▁",
    "Hello",
    "▁Hello",
    "▁world",
    "▁good",
    "day",
    ",",
    ".",
    "▁.",
    "é",
    "▁€",
    "\N{REPLACEMENT CHARACTER}",
]
PIECES = ["a", "##a", "hello", "##ing", "world", ".", ",", "'", "##'", "m", "n't", "do", "not", "é", "[UNK]"]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIP = decoders.Strip(" ", 1, 0)


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "[TOOL]")])
    tokenizer.add_tokens([AddedToken("<|think▁on|>", special=False)])
    return tokenizer


def _ids(names: list[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(dict.fromkeys(names))}


def byte_level() -> Tokenizer:
    """GPT-2's alphabet, and tokens of several bytes that begin or end within characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    (name, _), *_ = encode("€")
    (smile, _), *_ = encode("\N{SLIGHTLY SMILING FACE}")
    names = [*alphabet, "Ġa", "Ġworld", name, name[:2], name[1:], smile[:3], smile[2:] + "Ġ", "a" + name[0]]
    tokenizer = Tokenizer(models.BPE(_ids(names), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


def llama(*, strips: bool = True) -> Tokenizer:
    """Llama-2's and Mistral's kind; without the removal of the first space it is Gemma's."""
    vocabulary = _ids(["<unk>", *BYTES, *WORDS])
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([*LLAMA, STRIP] if strips else LLAMA)
    return _with_added(tokenizer)


def unigram_with_bytes() -> Tokenizer:
    """A SentencePiece unigram model with byte tokens."""
    vocabulary = [(name, -float(i)) for i, name in enumerate(["<unk>", *BYTES, *WORDS])]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([*LLAMA, STRIP])
    return _with_added(tokenizer)


def metaspace(prepend_scheme: str) -> Tokenizer:
    """T5's kind."""
    tokenizer = Tokenizer(models.Unigram([(name, -float(i)) for i, name in enumerate(["<unk>", *WORDS])], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    return _with_added(tokenizer)


def word_piece(*, cleanup: bool) -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(_ids(PIECES), unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return _with_added(tokenizer)


def word_level() -> Tokenizer:
    """Whole words, and no decoder: they are joined by spaces."""
    return _with_added(Tokenizer(models.WordLevel(_ids(["[UNK]", "hello", "world", ".", "é"]), "[UNK]")))


def word_ends() -> Tokenizer:
    """OpenAI GPT's kind, where the last token of a word is marked: a token's text depends on the one before it."""
    tokenizer = Tokenizer(models.BPE(_ids(["a", "a</w>", "hello</w>", "wor", "ld</w>", ".</w>"]), []))
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_added(tokenizer)


SMALL_TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "gemma": lambda: llama(strips=False),
    "unigram-bytes": unigram_with_bytes,
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-never": lambda: metaspace("never"),
    "metaspace-first": lambda: metaspace("first"),
    "wordpiece": lambda: word_piece(cleanup=False),
    "wordpiece-cleanup": lambda: word_piece(cleanup=True),
    "word-level": word_level,
    "word-ends": word_ends,
}
