"""The pieces of an answer from its events, shared by the APIs of chats."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.chat.output_parser import AnswerParser
from ...runtime.outputs import Event
from .chat_preparation import PreparedChat
from .token_usage import TokenUsage

ID_CHARACTERS = string.ascii_letters + string.digits  # Mistral's templates take no others
AnswerEnd = Literal["stop", "length", "tool_calls"]


class AnswerReader:
    """Reads the events of one answer, and counts its reasoning tokens in `usage`.

    keeps_reasoning  False drops the reasoning
    """

    def __init__(self, chat: PreparedChat, usage: TokenUsage, *, keeps_reasoning: bool = True) -> None:
        self.num_calls, self._usage = 0, usage
        self._is_call_cut = False
        self._parser: AnswerParser | None = chat.new_parser()
        self._keeps_reasoning = keeps_reasoning
        self._echo = chat.echo

    def read(self, event: Event) -> list[AnswerPart]:
        """Return the new pieces; the last event completes them."""
        parser = self._parser
        if parser is None:
            pieces = [AnswerPart("content", event.text)] if event.text else []
        else:
            pieces = self._parse(parser, event)
        if self._echo:
            pieces.insert(0, AnswerPart("content", self._echo))
            self._echo = ""
        return pieces

    def end(self, event: Event) -> AnswerEnd | None:
        """Return the reason of the end after the last event; None before."""
        assert event.finish_reason != "abort", "Handlers raises an error instead"
        assert event.finish_reason != "error"
        has_calls = self.num_calls > 0 and not self._is_call_cut
        return "tool_calls" if has_calls and event.finish_reason == "stop" else event.finish_reason

    def _parse(self, parser: AnswerParser, event: Event) -> list[AnswerPart]:
        was_in_reasoning = parser.in_reasoning
        pieces = parser.push(event.text)
        if was_in_reasoning or parser.in_reasoning:
            self._usage.num_reasoning += len(event.token_ids)
        if event.finished:
            self._is_call_cut = event.is_cut and parser.in_arguments
            pieces += parser.finish(is_cut=event.is_cut)
        self.num_calls += sum(piece.kind == "call" for piece in pieces)
        return pieces if self._keeps_reasoning else [piece for piece in pieces if piece.kind != "reasoning"]


@dataclass
class ParsedCall:
    """A tool call, or its new part in a stream; `name` and `id` are empty in a later part."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedAnswer:
    """The fields of a message, or of its new part in a stream; `calls` by their index in the message."""

    reasoning: str = ""
    content: str = ""
    calls: dict[int, ParsedCall] = field(default_factory=dict)


class AnswerFields:
    """Sorts the pieces of an answer into the fields of a message."""

    def __init__(self, id_length: int) -> None:
        self._id_length, self._num_calls = id_length, 0

    def sort(self, pieces: Iterable[AnswerPart]) -> ParsedAnswer:
        """Return the fields of these pieces; calls are numbered from the first piece of the answer on."""
        answer = ParsedAnswer()
        for kind, text in pieces:
            if kind == "content":
                answer.content += text
            elif kind == "reasoning":
                answer.reasoning += text
            elif kind == "call":
                answer.calls[self._num_calls] = ParsedCall(new_call_id(self._id_length), text)
                self._num_calls += 1
            else:
                answer.calls.setdefault(self._num_calls - 1, ParsedCall("", "")).arguments += text
        return answer


def new_call_id(length: int) -> str:
    """Return a random id; Mistral's chat templates take nine letters and digits only."""
    text = "".join(secrets.choice(ID_CHARACTERS) for _ in range(length))
    return text if length == 9 else f"call_{text}"
