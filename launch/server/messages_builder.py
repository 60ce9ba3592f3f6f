"""Replies of Anthropic's Messages API, from the parts of one answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from ...runtime.outputs import Event
from .answer_reader import AnswerEnd, new_call_id
from .api_errors import ApiError
from .block_builder import BlockBuilder, Json
from .chat_preparation import PreparedChat
from .http_io import NamedEvent
from .token_usage import TokenUsage

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
BLOCK_TYPES = {"content": "text", "reasoning": "thinking", "call": "tool_use", "arguments": "tool_use"}


class MessagesBuilder(BlockBuilder):
    """Builds the reply of one request."""

    def __init__(self, model: str, usage: TokenUsage, chat: PreparedChat) -> None:
        super().__init__(BLOCK_TYPES, usage, chat)
        self._arguments = ""  # of the last block, if it is a call
        self._message: Json = {
            "id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "model": model,
            "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip

    def failure(self, error: ApiError) -> list[NamedEvent]:
        """Return the event of an error within a stream."""
        return [NamedEvent("error", error.anthropic_reply().model_dump())]

    def _begin(self) -> Iterator[NamedEvent]:
        yield _event("message_start", message=self._message | {"content": [], "usage": self._counts(num_output=0)})

    def _open(self, kind: str, name: str) -> Iterator[NamedEvent]:
        block: Json = {"type": kind}
        if kind == "tool_use":
            block |= {"id": new_call_id(self._id_length), "name": name, "input": {}}
        else:
            block |= {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
        self._blocks.append(block)
        self._arguments = ""
        yield self._block_event("content_block_start", content_block=dict(block))

    def _extend(self, kind: str, text: str) -> NamedEvent:
        if kind == "tool_use":
            self._arguments += text
            return self._block_event("content_block_delta", delta={"type": "input_json_delta", "partial_json": text})
        delta_type, field = DELTAS[kind]
        self._blocks[-1][field] += text
        return self._block_event("content_block_delta", delta={"type": delta_type, field: text})

    def _close(self, *, is_cut: bool) -> Iterator[NamedEvent]:
        self._is_open, block = False, self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _as_object(self._arguments, is_cut=is_cut)
        yield self._block_event("content_block_stop")

    def _end(self, end: AnswerEnd, event: Event) -> Iterator[NamedEvent]:
        stop: Json = {"stop_reason": STOP_REASONS[end], "stop_sequence": None}
        if end == "stop" and isinstance(event.stop_reason, str):  # a stop string of the request
            stop = {"stop_reason": "stop_sequence", "stop_sequence": event.stop_reason}
        counts = self._counts(self._usage.num_completion)
        self._response = self._message | stop | {"content": self._blocks, "usage": counts}
        yield _event("message_delta", delta=stop, usage=counts)
        yield _event("message_stop")

    def _block_event(self, name: str, **fields: Any) -> NamedEvent:
        return _event(name, index=len(self._blocks) - 1, **fields)

    def _counts(self, num_output: int) -> Json:
        """Return the usage; Anthropic counts cached tokens of the prompt apart from the others."""
        cached = sum(self._usage.num_cached.values())
        return {
            "input_tokens": self._usage.num_prompt - cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached, "output_tokens": num_output,
        }  # fmt: skip


def _event(name: str, **fields: Any) -> NamedEvent:
    return NamedEvent(name, {"type": name, **fields})


def _as_object(arguments: str, *, is_cut: bool) -> Json:
    """Return the arguments of a call; those of a call that was cut off are under the key `_incomplete`."""
    try:
        value = json.loads(arguments or ("" if is_cut else "{}"))
    except (ValueError, RecursionError):
        return {"_incomplete": arguments}
    return value if isinstance(value, dict) else {"_incomplete": arguments}
