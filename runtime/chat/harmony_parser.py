"""Answers in harmony, the format of gpt-oss: messages with a header that names a channel, and perhaps a recipient.

    <|start|>assistant<|channel|>analysis<|message|>TEXT<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>
    <|start|>assistant<|channel|>final<|message|>TEXT<|return|>

The channel `analysis` is reasoning. A message to a recipient is a call, in whatever channel and wherever the header
has the recipient. Other messages are content. A prompt ends within the first header, or within a message to continue.
"""

from __future__ import annotations

import re
from typing import Literal

from .call_readers import AnswerPart
from .text_scanning import MarkerSearch

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]{1,256})")
REASONING = re.compile(re.escape(CHANNEL) + r"\s*analysis\b")


class HarmonyParser:
    """The AnswerParser of harmony.

    prompt_end     the end of the prompt, from the beginning of the assistant's turn at the latest
    returns_calls  False leaves messages to a recipient in the content
    """

    def __init__(self, prompt_end: str, *, returns_calls: bool) -> None:
        self._returns_calls = returns_calls
        self._search = MarkerSearch(MARKERS)
        self._prompt_header: str | None = None
        self._header: str | None = ""  # its text so far; None within a message
        self._kind: Literal["reasoning", "content", "arguments"] = "content"
        self._is_empty = True  # the message, so far
        self._buffer = ""
        self.push(prompt_end[max(prompt_end.rfind(START), 0) :])
        self._prompt_header = self._header  # the part of the first header that the prompt has; None behind that header

    @property
    def in_reasoning(self) -> bool:
        return self._header is None and self._kind == "reasoning"

    @property
    def in_arguments(self) -> bool:
        return self._header is None and self._kind == "arguments"

    @property
    def in_message(self) -> bool:
        """True if the text so far ends within a message, not within a header."""
        return self._header is None

    def push(self, text: str) -> list[AnswerPart]:
        """Return the pieces that are certain with this text."""
        self._buffer += text
        pieces: list[AnswerPart] = []
        while (match := self._search.find(self._buffer)) is not None:
            before, self._buffer = self._buffer[: match.start()], self._buffer[match.end() :]
            self._add_text(pieces, before)
            self._apply_marker(pieces, match.group())
        end = self._search.num_certain(self._buffer)
        self._add_text(pieces, self._buffer[:end])
        self._buffer = self._buffer[end:]
        return pieces

    def finish(self, *, is_cut: bool) -> list[AnswerPart]:
        """Return the last pieces; an answer without any header is content."""
        pieces: list[AnswerPart] = []
        if not is_cut:
            self._add_text(pieces, self._buffer)
        self._buffer = ""
        if self._header is None:
            if not is_cut:
                self._end_message(pieces)
        elif self._prompt_header is not None and CHANNEL not in self._header:
            rest = self._header[len(self._prompt_header) :].strip()
            if is_cut and (RECIPIENT.match(rest) or "to=functions.".startswith(rest)):
                return pieces
            self._header, self._kind = None, "content"
            self._add_text(pieces, rest)
        return pieces

    def _add_text(self, pieces: list[AnswerPart], text: str) -> None:
        if self._header is not None:
            self._header += text
        elif text:
            self._is_empty = False
            pieces.append(AnswerPart(self._kind, text))

    def _apply_marker(self, pieces: list[AnswerPart], marker: str) -> None:
        if self._header is not None:
            if marker == MESSAGE:
                self._begin_message(pieces, self._header)
            elif marker in (CHANNEL, CONSTRAIN):
                self._header += marker
            else:
                self._header, self._prompt_header = "", None
        elif marker in (MESSAGE, CONSTRAIN):
            self._add_text(pieces, marker)
        else:
            self._end_message(pieces)
            self._header, self._prompt_header = marker if marker == CHANNEL else "", None

    def _begin_message(self, pieces: list[AnswerPart], header: str) -> None:
        recipient = RECIPIENT.search(header)
        if recipient is not None and self._returns_calls:
            self._kind = "arguments"
            pieces.append(AnswerPart("call", recipient[1]))
        else:
            self._kind = "reasoning" if recipient is None and REASONING.search(header) else "content"
        self._header, self._is_empty = None, True

    def _end_message(self, pieces: list[AnswerPart]) -> None:
        if self._kind == "arguments" and self._is_empty:
            pieces.append(AnswerPart("arguments", "{}"))
