"""Replies of Anthropic's Messages API, from the parts of one answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.outputs import Event
from .answer_reader import AnswerReader, new_call_id
from .api_errors import ApiError
from .chat_preparation import PreparedChat
from .http_io import NamedEvent
from .token_usage import TokenUsage

Json = dict[str, Any]
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
BLOCK_TYPES = {"content": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessagesBuilder:
    """Builds the reply of one request, streamed or whole; blocks follow the order of the text."""

    end_of_stream = b""

    def __init__(self, model: str, usage: TokenUsage, chat: PreparedChat) -> None:
        self._usage, self._id_length = usage, chat.id_length
        self._reader = AnswerReader(chat, usage)
        self._blocks: list[Json] = []
        self._arguments = ""  # of the last block, if it is a call
        self._is_open = False  # whether the last block is not complete
        self._message: Json = {
            "id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "model": model,
            "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip

    async def stream(
        self, events: AsyncIterator[tuple[int, Event]], *, with_usage: bool = True, in_every_chunk: bool = False
    ) -> AsyncIterator[NamedEvent]:
        """Yield the events of a streamed reply; they always have the usage."""
        is_first = True
        async for _, event in events:
            if is_first:
                message = self._message | {"content": [], "usage": self._counts() | {"output_tokens": 0}}
                yield _event("message_start", message=message)
                is_first = False
            for part in self._reader.read(event):
                for made in self._add(part):
                    yield made
            end = self._reader.end(event)
            if end is not None:
                for made in self._close():
                    yield made
                delta = self._stop(end, event)
                yield _event("message_delta", delta=delta, usage=self._counts())
                yield _event("message_stop")

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> list[bytes]:
        """Return the JSON of the reply after the last event."""
        stop: Json = {}
        async for event in self.stream(events):
            stop = event.data.get("delta", stop) if event.name == "message_delta" else stop
        return [msgspec.json.encode(self._message | stop | {"content": self._blocks, "usage": self._counts()})]

    def failure(self, error: ApiError) -> NamedEvent:
        """Return the event of an error within a stream."""
        return NamedEvent("error", error.anthropic_reply().model_dump())

    def _add(self, part: AnswerPart) -> Iterator[NamedEvent]:
        """Yield the events of a part of the answer, with those of the block that it ends or begins."""
        kind = BLOCK_TYPES[part.kind]
        if not self._is_open or self._blocks[-1]["type"] != kind or part.kind == "call":
            yield from self._close()
            yield self._open(kind, part.text)
        if part.kind == "call":
            return
        if part.kind == "arguments":
            self._arguments += part.text
            delta = {"type": "input_json_delta", "partial_json": part.text}
        else:
            delta_type, field = DELTAS[kind]
            self._blocks[-1][field] += part.text
            delta = {"type": delta_type, field: part.text}
        yield _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _open(self, kind: str, name: str) -> NamedEvent:
        """Begin a block; `name` is that of a called tool."""
        block: Json = {"type": kind}
        if kind == "tool_use":
            block |= {"id": new_call_id(self._id_length), "name": name, "input": {}}
        else:
            block |= {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
        self._blocks.append(block)
        self._is_open, self._arguments = True, ""
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=dict(block))

    def _close(self) -> Iterator[NamedEvent]:
        """End the block that is not complete, if there is one."""
        if not self._is_open:
            return
        self._is_open, block = False, self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _as_object(self._arguments)
        yield _event("content_block_stop", index=len(self._blocks) - 1)

    def _stop(self, end: str, event: Event) -> Json:
        """Return why the answer ended; a stop string of the request gives `stop_sequence`."""
        if end == "stop" and isinstance(event.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": event.stop_reason}
        return {"stop_reason": STOP_REASONS[end], "stop_sequence": None}

    def _counts(self) -> Json:
        """Return the usage; Anthropic counts cached tokens of the prompt apart from the others."""
        cached = sum(self._usage.num_cached.values())
        return {
            "input_tokens": self._usage.num_prompt - cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached, "output_tokens": self._usage.num_completion,
        }  # fmt: skip


def _event(name: str, **fields: Any) -> NamedEvent:
    return NamedEvent(name, {"type": name, **fields})


def _as_object(arguments: str) -> Json:
    """Return the arguments of a call; those of a call that was cut off are under the key `_incomplete`."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"_incomplete": arguments}
    return value if isinstance(value, dict) else {"_incomplete": arguments}
