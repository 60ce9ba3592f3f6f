"""Answers that are a list of blocks in the order of the text, with named events in streams: Responses and Messages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import msgspec

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.outputs import Event
from .answer_reader import AnswerEnd, AnswerReader
from .api_errors import ApiError
from .chat_preparation import PreparedChat
from .http_io import NamedEvent
from .token_usage import TokenUsage

Json = dict[str, Any]


class BlockBuilder(ABC):
    """Builds the response of one request, streamed or whole.

    block_types  the `type` of the block for each kind of AnswerPart
    """

    end_of_stream = b""

    def __init__(self, block_types: Mapping[str, str], usage: TokenUsage, chat: PreparedChat) -> None:
        self._block_types, self._usage, self._id_length = block_types, usage, chat.id_length
        self._reader = AnswerReader(chat, usage)
        self._blocks: list[Json] = []
        self._is_open = False  # whether the last block is not complete
        self._response: Json = {}  # the whole response, once the answer has ended

    async def stream(self, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[NamedEvent]:
        """Yield the events of a streamed response, which always has the usage."""
        is_first = True
        async for _, event in events:
            if is_first:
                for made in self._begin():
                    yield made
                is_first = False
            for made in self._read(event):
                yield made

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> list[bytes]:
        """Return the JSON of the response after the last event."""
        async for _ in self.stream(events):
            pass
        return [msgspec.json.encode(self._response)]

    def _read(self, event: Event) -> Iterator[NamedEvent]:
        """Yield the events that an event of the engine makes."""
        for part in self._reader.read(event):
            yield from self._add(part)
        end = self._reader.end(event)
        if end is not None:
            if self._is_open:
                yield from self._close(is_cut=end == "length")
            yield from self._end(end, event)

    def _add(self, part: AnswerPart) -> Iterator[NamedEvent]:
        """Yield the events of a part of the answer, with those of the block that it ends or begins."""
        kind = self._block_types[part.kind]
        if not self._is_open or self._blocks[-1]["type"] != kind or part.kind == "call":
            if self._is_open:
                yield from self._close(is_cut=False)
            self._is_open = True
            yield from self._open(kind, part.text)
        if part.kind != "call":
            yield self._extend(kind, part.text)

    @abstractmethod
    def failure(self, error: ApiError) -> list[NamedEvent]:
        """Return the events of an error within a stream."""

    @abstractmethod
    def _begin(self) -> Iterator[NamedEvent]:
        """Yield the first events."""

    @abstractmethod
    def _open(self, kind: str, name: str) -> Iterator[NamedEvent]:
        """Begin a block; `name` is that of a called tool."""

    @abstractmethod
    def _extend(self, kind: str, text: str) -> NamedEvent:
        """Add text or arguments to the last block."""

    @abstractmethod
    def _close(self, *, is_cut: bool) -> Iterator[NamedEvent]:
        """Complete the last block."""

    @abstractmethod
    def _end(self, end: AnswerEnd, event: Event) -> Iterator[NamedEvent]:
        """Yield the last events, and store the response; `event` is the engine's last one."""
