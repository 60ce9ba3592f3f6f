"""Answers in a format that only the checkpoint's `response_template` describes, parsed by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .call_readers import AnswerPart, arguments_text, encodable
from .template_format import REASONING_FIELDS

if TYPE_CHECKING:
    from transformers.utils.chat_parsing.response_templates import ResponseTemplate

GOES_ON = "\0"  # a character that is in no marker
FAULTS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of a call that cannot be parsed


class TemplateParser:
    """An AnswerParser over transformers' ResponseParser; a call comes whole, when it is complete.

    template  the tokenizer's response_template, compiled
    prefix    the text of the prompt, of which the assistant's turn counts
    tools     the tools as a chat template takes them; their schemas give the arguments their types
    """

    def __init__(self, template: ResponseTemplate, prefix: str, tools: Sequence[dict[str, Any]]) -> None:
        from transformers.utils.chat_parsing import ResponseParser  # with the template

        try:
            self._parser = ResponseParser(template, prefix=prefix, tools=list(tools) or None)
        except FAULTS:  # the message to continue has a call that cannot be parsed
            self._parser = ResponseParser(template, prefix="", tools=list(tools) or None)
        self.in_reasoning = False
        self.in_arguments = False  # calls come whole
        calls = template.fields.get("tool_calls")
        self._calls_close = calls is None or calls.close_re is not None
        self._failed = False
        self._body = ""  # text of the call that is open
        self._blanks: str | None = None  # held back at the end of a field; None at its beginning
        for event in self._parser.initial_events:
            self._note(event)

    def push(self, text: str) -> list[AnswerPart]:
        """Return the pieces that are certain with this text."""
        if self._failed:
            return [AnswerPart("content", text)] if text else []
        try:
            return self._pieces(self._parser.feed(text))
        except FAULTS:
            return self._fail(text)

    def finish(self, *, is_cut: bool) -> list[AnswerPart]:
        """Return the last pieces; the text of a call that cannot be parsed is content, or dropped if it was cut."""
        if self._failed:
            return []
        try:
            return self._cut_pieces() if is_cut else self._pieces(self._parser.finalize()[1])
        except FAULTS:
            return [] if is_cut else self._fail("")

    def _cut_pieces(self) -> list[AnswerPart]:
        """Return the calls that the text completes, without markers that have begun.

        A text that goes on decides which markers are complete; the end of a text would also end the call that is open.
        """
        events = self._parser.feed(GOES_ON) if self._calls_close else self._parser.finalize()[1]
        return self._pieces([event for event in events if event["field"] == "tool_calls"])

    def _fail(self, text: str) -> list[AnswerPart]:
        """Return the text of a call that cannot be parsed as content, and all text behind it."""
        self._failed, self.in_reasoning = True, False
        body, self._body = self._body + text, ""
        return [AnswerPart("content", body)] if body else []

    def _pieces(self, events: Sequence[dict[str, Any]]) -> list[AnswerPart]:
        return [piece for event in events for piece in self._piece(event)]

    def _piece(self, event: dict[str, Any]) -> Iterator[AnswerPart]:
        field = event["field"]
        self._note(event)
        if field == "tool_calls":
            if event["type"] == "region_close":
                yield from _calls(event["value"])
        elif event["type"] == "region_chunk" and (field == "content" or field in REASONING_FIELDS):
            kind: Literal["reasoning", "content"] = "content" if field == "content" else "reasoning"
            if text := self._visible(event["text"]):
                yield AnswerPart(kind, text)

    def _visible(self, text: str) -> str:
        """Return a text without whitespace at the beginning and the end of its field."""
        if self._blanks is None:
            text = text.lstrip()
        visible = text.rstrip()
        if not visible and self._blanks is None:
            return ""
        held, self._blanks = self._blanks or "", (self._blanks or "") + text if not visible else text[len(visible) :]
        return held + visible if visible else ""

    def _note(self, event: dict[str, Any]) -> None:
        """Remember whether reasoning is open, and the text of an open call."""
        match event["type"]:
            case "region_open":
                self.in_reasoning = event["field"] in REASONING_FIELDS
                self._body, self._blanks = "", None
            case "region_close":
                self.in_reasoning, self._body = False, ""
            case _ if event["field"] == "tool_calls":
                self._body += event["text"]


def _calls(value: Any) -> Iterator[AnswerPart]:
    """Yield the pieces of the calls of a region, one or a list of them."""
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call)
        yield AnswerPart("call", encodable(str(function["name"])))
        yield AnswerPart("arguments", arguments_text(function["arguments"]))
