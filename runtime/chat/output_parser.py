"""One state machine for reasoning, content and tool calls in the text of an answer.

    CONTENT --<think>--> REASONING --</think>--> CONTENT
    CONTENT, REASONING --marker of a call--> CALL --end of the block--> back to where the call came

- Whitespace beside a marker belongs to no field.
- A `</think>` outside of reasoning is dropped, as is a `<think>` within it.
- A call inside of reasoning is a call; the reasoning continues behind it.
- Text behind a marker that is no call is text, the marker included.
- An output that ends within a call keeps the call with the arguments so far if its name is complete. Otherwise the
  text of the call is content, unless the output was cut: then it is dropped, as is the beginning of a marker.

transformers' ResponseParser does not fit here. It returns a call only when its region closes, so that no arguments can
be streamed. It raises for a call that is not JSON, closes a region at a marker within a JSON string, and looks for no
call inside of reasoning. It takes 6 to 17 us a token. It serves the formats that only a response_template describes
(template_parser.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from .call_readers import AnswerPart, CallReader
from .text_scanning import MarkerSearch


@dataclass(frozen=True)
class ReasoningFormat:
    """The markers around reasoning; with `always`, an answer begins with reasoning and has no opening marker."""

    open: str
    close: str
    always: bool = False


class AnswerParser(Protocol):
    """Turns the text of one answer into pieces."""

    @property
    def in_reasoning(self) -> bool:
        """True if the text so far ends within reasoning."""
        ...

    @property
    def in_arguments(self) -> bool:
        """True if the text so far ends within the arguments of a call."""
        ...

    def push(self, text: str) -> list[AnswerPart]:
        """Return the pieces that are certain with this text."""
        ...

    def finish(self, *, is_cut: bool) -> list[AnswerPart]:
        """Return the last pieces; the text has ended.

        is_cut  it was cut by a limit or a stop string: the beginning of a marker, and of a call without a name, is
                dropped instead of text
        """
        ...


class OutputParser:
    """The state machine for formats with markers.

    reasoning     None leaves reasoning in the content
    call_markers  what begins a block of calls; empty leaves calls in the content
    new_reader    returns the reader of a block
    bare_calls    calls have no marker: a JSON object at the beginning of the content is tried as a call, and so is
                  one behind a call and a semicolon
    """

    def __init__(
        self,
        reasoning: ReasoningFormat | None,
        call_markers: tuple[str, ...],
        new_reader: Callable[[], CallReader],
        *,
        bare_calls: bool = False,
        in_reasoning: bool = False,
    ) -> None:
        self.in_reasoning = in_reasoning
        self._open = reasoning.open if reasoning else None
        self._close = reasoning.close if reasoning else None
        self._new_reader = new_reader
        think = (reasoning.open, reasoning.close) if reasoning else ()
        self._search = MarkerSearch([*think, *call_markers])
        self._bare_calls = bare_calls
        self._tries_bare = bare_calls and not in_reasoning
        self._reader: CallReader | None = None
        self._marker = ""  # the text that opened the reader's block, with the whitespace before it
        self._buffer = ""
        self._skips_blanks = in_reasoning

    @property
    def in_arguments(self) -> bool:
        return self._reader is not None and self._reader.in_arguments

    def push(self, text: str) -> list[AnswerPart]:
        """Return the pieces that are certain with this text."""
        self._buffer += text
        pieces: list[AnswerPart] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self, *, is_cut: bool) -> list[AnswerPart]:
        """Return the last pieces; the text has ended."""
        pieces: list[AnswerPart] = []
        if self._reader is not None:
            pieces += self._reader.finish(is_cut=is_cut)
            self._end_block(pieces, self._reader)
            while self._step(pieces):
                pass
            if self._reader is not None:  # text of a failed block that begins another one
                return pieces + self.finish(is_cut=is_cut)
        if not (is_cut and self._ends_within_marker()):
            self._text(pieces, self._buffer)
        self._buffer = ""
        return pieces

    def _ends_within_marker(self) -> bool:
        """Return whether the text that was held back is the beginning of a marker, or stands before a bare call."""
        if self._tries_bare and self._skips_blanks and not self._buffer.strip("; \t\r\n"):
            return True
        return self._search.num_certain(self._buffer) < len(self._buffer)

    def _step(self, pieces: list[AnswerPart]) -> bool:
        """Advance to the next marker or to the end of the block; return False if more text is needed."""
        if self._reader is not None:
            text, self._buffer = self._buffer, ""
            pieces += self._reader.push(text)
            if self._reader.rest is None:
                return False
            self._end_block(pieces, self._reader)
            return True
        if self._tries_bare and not self.in_reasoning:
            text = self._buffer.lstrip("; \t\r\n" if self._skips_blanks else None)
            if text.startswith("{"):
                self._reader, self._marker, self._buffer = self._new_reader(), "", text
                return True
            if not text:
                return False
        match = self._search.find(self._buffer)
        if match is None:
            self._emit_certain(pieces)
            return False
        text, marker = self._buffer[: match.start()], match.group()
        visible = text.rstrip()
        self._text(pieces, visible)
        blanks = text[len(visible) :]
        self._buffer = self._buffer[match.end() :]
        if marker == (self._open if self.in_reasoning else self._close):
            self._buffer = blanks + self._buffer  # a repeated marker has no effect
        else:
            self._enter(marker, blanks)
        return True

    def _enter(self, marker: str, blanks: str) -> None:
        """Take a marker that begins or ends reasoning, or begins a block of calls."""
        if marker in (self._open, self._close):
            self.in_reasoning = marker == self._open
            self._tries_bare = self._bare_calls
        else:
            self._reader, self._marker = self._new_reader(), marker if self._skips_blanks else blanks + marker
        self._skips_blanks = True

    def _emit_certain(self, pieces: list[AnswerPart]) -> None:
        """Return the text that is neither the beginning of a marker nor whitespace, which a marker may follow."""
        end = self._search.num_certain(self._buffer)
        end = len(self._buffer[:end].rstrip())
        self._text(pieces, self._buffer[:end])
        self._buffer = self._buffer[end:]

    def _end_block(self, pieces: list[AnswerPart], reader: CallReader) -> None:
        """Return to the text around a block of calls."""
        assert reader.rest is not None
        self._reader, self._buffer = None, reader.rest + self._buffer
        self._skips_blanks, self._tries_bare = True, self._bare_calls and not reader.failed
        if reader.failed and self._marker:
            self._skips_blanks = False
            self._text(pieces, self._marker)

    def _text(self, pieces: list[AnswerPart], text: str) -> None:
        if self._skips_blanks:
            text = text.lstrip()
        if text:
            self._skips_blanks = self._tries_bare = False
            kind: Literal["reasoning", "content"] = "reasoning" if self.in_reasoning else "content"
            pieces.append(AnswerPart(kind, text))
