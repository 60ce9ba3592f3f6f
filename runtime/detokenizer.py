"""Incremental detokenization: the bytes that each token adds to a text, and the text of an output as its tokens come.

A text is the UTF-8 of the bytes of its tokens, one after another. The bytes of a token are looked up once, by decoding
it after another token; from then on a token costs a dictionary lookup. `tokenizers.decoders.DecodeStream` is no
substitute: it loses the space after a skipped special token, and fails where byte tokens make an invalid character.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes of UTF-8
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# The decoders with which a token adds the same bytes after any other token.
CONTEXT_FREE = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}

EACH_BYTE = "lockstep_replace_each_byte"  # ByteFallback shows each byte of an invalid character as U+FFFD
codecs.register_error(EACH_BYTE, lambda error: (REPLACEMENT * (error.end - error.start), error.end))  # type: ignore[attr-defined]


class TokenBytes(dict[int, bytes]):
    """The bytes that each token adds after another one, by id: empty for unknown ids, the content of special tokens.

    `errors` is the error handler with which Python decodes the bytes as the tokenizer does: U+FFFD for invalid UTF-8.
    The argument is a `tokenizers.Tokenizer`. Entries are added when they are first needed.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
        kinds = {step["type"] for step in steps}
        self._is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        self.is_context_free = self._is_byte_level or _is_context_free(steps)
        self._has_byte_tokens = self.is_context_free and "ByteFallback" in kinds
        self.errors = EACH_BYTE if self._has_byte_tokens else "replace"
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._neighbor = [] if self._is_byte_level else self._find_neighbor()
        if not self.is_context_free and kinds & {"ByteLevel", "ByteFallback"}:
            names = ", ".join(step["type"] for step in steps)
            log.warning("the decoders of tokenizer.json (%s) show characters made of several tokens as U+FFFD", names)

    def __missing__(self, token: int) -> bytes:
        self[token] = piece = self.after(self._neighbor, token)
        return piece

    def after(self, context: Sequence[int], token: int) -> bytes:
        """Return the bytes that a token adds to the text of `context`, which may be empty."""
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if self._is_byte_level:
            return _byte_level(name)
        before, text = self._decode(context), self._decode([*context, token])
        if self._has_byte_tokens and (byte := BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(byte[1]) if len(text) > len(before) else b""
        return text[len(before) :].encode()

    def text(self, token: int) -> str:
        """Return the text of a token after another one, with U+FFFD for a part of a character."""
        return self[token].decode(errors=self.errors)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def _find_neighbor(self) -> list[int]:
        """Return a token for others to follow: the first that reads as it is called, which no byte token does."""
        for token in range(self._backend.get_vocab_size()):
            name = self._backend.id_to_token(token)
            if name and self._decode([token]) == name:
                return [token]
        return []


class Detokenizer:
    """The text of one output as its tokens come, in whole characters.

    The pieces join to `decode(prompt + output)` without `decode(prompt)`. The first bytes of a character at the end of
    the prompt belong to the output, which has the others. `copy.copy` makes a detokenizer for the prompt's next output.
    """

    def __init__(
        self, token_bytes: TokenBytes, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self.token_bytes = token_bytes
        self._errors = token_bytes.errors
        self.skipped_ids = token_bytes.special_ids if skip_special_tokens else frozenset()
        # Tokens on which the next one depends: none at the beginning of a text, None where it depends on no other.
        self._context: Sequence[int] | None = ()
        self._partial = self._read_end(prompt)  # the bytes of an incomplete character

    def push(self, token: int) -> str:
        """Return the text that is certain with this token; may be empty."""
        if token in self.skipped_ids:
            return ""
        piece = self.token_bytes[token]
        if self._context is not None:
            piece = self._in_context(token)
            self._add_to_context(token)
        data = self._partial + piece
        text, num_bytes = utf_8_decode(data, self._errors)
        self._partial = data[num_bytes:]
        return text

    def flush(self) -> str:
        """Return the rest of the text: U+FFFD for an incomplete character."""
        rest, self._partial = self._partial, b""
        return rest.decode(errors=self._errors)

    def peek(self, token: int) -> tuple[bytes, int]:
        """Return the bytes that a token would add, and the number of characters that would come before them.

        These replace an incomplete character that the token does not continue.
        """
        piece = b"" if token in self.skipped_ids else self._in_context(token)
        try:
            utf_8_decode(self._partial + piece[:1])
        except UnicodeDecodeError:
            return piece, len(self._partial.decode(errors=self._errors))
        return piece, 0

    def _in_context(self, token: int) -> bytes:
        piece = self.token_bytes[token]
        return self.token_bytes.after(self._context, token) if piece and self._context is not None else piece

    def _add_to_context(self, token: int) -> None:
        if self.token_bytes[token]:
            self._context = None if self.token_bytes.is_context_free else (token,)

    def _read_end(self, prompt: Sequence[int]) -> bytes:
        """Take the end of a prompt as context; return the bytes of an incomplete character there.

        A special token after such bytes ends the character.
        """
        end, is_open = b"", True
        for token in reversed(prompt):
            if token in self.skipped_ids:
                is_open = False
            elif piece := self.token_bytes[token]:
                if not self._context:
                    self._add_to_context(token)
                if is_open:
                    end = piece + end
                if not is_open or len(end) >= LONGEST_CHARACTER:
                    break
        return end[utf_8_decode(end, self._errors)[1] :]


class PromptText(NamedTuple):
    """A prompt's text with its tokens, for `echo`: `text[offsets[i]:]` begins with the text of token i, `pieces[i]`."""

    text: str
    pieces: Sequence[bytes] = ()
    offsets: Sequence[int] = ()


def locate_tokens(token_bytes: TokenBytes, ids: Sequence[int], text: str | None = None) -> PromptText:
    """Return where each token of a prompt begins in its text, or in the text of `ids` with all special tokens.

    A special token that the tokenizer adds is in no prompt: it has the place of the token after it. Where the
    tokenizer changes the text (lower case, unknown characters), places are estimated from the lengths of the tokens.
    """
    if text is None:
        detokenizer = Detokenizer(token_bytes, skip_special_tokens=False)
        text = "".join(map(detokenizer.push, ids))
    detokenizer, pieces, offsets, end = Detokenizer(token_bytes, skip_special_tokens=False), [], [], 0
    for token in ids:
        piece, num_before = detokenizer.peek(token)
        offsets.append(min(end + num_before, len(text)))
        part = detokenizer.push(token)
        if part.startswith(" ") and not text.startswith(part, end) and text.startswith(part[1:], end):
            part, piece = part[1:], piece.removeprefix(b" ")  # the tokenizer put a space before the text
        if token not in token_bytes.special_ids or text.startswith(part, end):
            end += len(part)
        pieces.append(piece)
    return PromptText(text, pieces, offsets)


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the decoders of a sequence, which may hold sequences, in their order."""
    return [step for part in decoder["decoders"] for step in _steps(part)] if "decoders" in decoder else [decoder]


def _is_context_free(steps: Iterable[dict[str, Any]]) -> bool:
    is_fused = False  # from here on a step sees the text of all tokens at once
    for step in steps:
        if step["type"] not in CONTEXT_FREE or (step["type"] == "Replace" and is_fused):
            return False
        if step["type"] == "Strip" and (step["start"] > 1 or step["stop"] > 0):
            return False
        is_fused |= step["type"] == "Fuse"
    return True


def _byte_level(name: str) -> bytes:
    """Return the bytes of a token of GPT-2's alphabet; those of its own UTF-8 if it has other characters."""
    try:
        return bytes([BYTE_OF[character] for character in name])
    except KeyError:
        return name.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet, where unprintable bytes are characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()
