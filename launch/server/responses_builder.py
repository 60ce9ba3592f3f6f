"""Responses of OpenAI's Responses API, from the parts of one answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.outputs import Event
from .answer_reader import AnswerEnd, new_call_id
from .api_errors import ApiError
from .block_builder import BlockBuilder, Json
from .chat_preparation import PreparedChat
from .http_io import NamedEvent
from .logprob_texts import LogprobWriter
from .protocol.responses_models import ResponsesRequest
from .token_usage import TokenUsage

BLOCK_TYPES = {
        "content": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"
    }  # fmt: skip


class ResponsesBuilder(BlockBuilder):
    """Builds the response of one request; a block is an item of its output."""

    def __init__(self, body: ResponsesRequest, model: str, usage: TokenUsage, chat: PreparedChat) -> None:
        super().__init__(BLOCK_TYPES, usage, chat)
        self._num_events = 0
        self._fields = _response_fields(body, model)
        self._namespaces = body.namespaces()
        self._logprob_writer = LogprobWriter(body.top_logprobs or 0) if body.has_logprobs else None
        self._logprobs: list[Json] = []  # of tokens whose text has not come yet

    def failure(self, error: ApiError) -> list[NamedEvent]:
        """Return the events of an error within a stream: the error, and the response that has failed."""
        detail = error.reply().error
        if self._is_open:
            self._blocks[-1]["status"] = "incomplete"
        code = detail.code if detail.code == "rate_limit_exceeded" else "server_error"  # a response takes few codes
        failed = self._state("failed") | {"error": {"code": code, "message": detail.message}}
        return [
            self._event("error", code=detail.code, message=detail.message, param=detail.param),
            self._event("response.failed", response=failed),
        ]

    def _begin(self) -> Iterator[NamedEvent]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._state("in_progress"))

    def _read(self, event: Event) -> Iterator[NamedEvent]:
        if self._logprob_writer is not None:
            self._logprobs += [entry.model_dump() for entry in self._logprob_writer.chat(event)]
        return super()._read(event)

    def _add(self, part: AnswerPart) -> Iterator[NamedEvent]:
        yield from super()._add(part)
        self._logprobs = []

    def _open(self, kind: str, name: str) -> Iterator[NamedEvent]:
        item: Json = {"id": f"{_ID_PREFIXES[kind]}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": new_call_id(self._id_length), "name": name, "arguments": ""}
            if name in self._namespaces:
                item["namespace"], item["name"] = self._namespaces[name]
        else:
            more: Json = {"role": "assistant"} if kind == "message" else {"summary": [], "encrypted_content": None}
            item |= more
            item["content"] = []
        self._blocks.append(item)
        yield self._event("response.output_item.added", output_index=len(self._blocks) - 1, item=_copy(item))
        if kind != "function_call":
            lists: Json = {"annotations": [], "logprobs": []} if kind == "message" else {}
            item["content"].append({"type": _TEXT_TYPES[kind], "text": "", **lists})
            yield self._content_event("response.content_part.added", part=_copy(item)["content"][0])

    def _extend(self, kind: str, text: str) -> NamedEvent:
        item, more = self._blocks[-1], dict[str, Any]()
        if kind == "function_call":
            item["arguments"] += text
            return self._item_event("response.function_call_arguments.delta", delta=text)
        item["content"][0]["text"] += text
        if kind == "message":
            more["logprobs"] = self._logprobs
            item["content"][0]["logprobs"] += self._logprobs
        return self._content_event(f"response.{_TEXT_TYPES[kind]}.delta", delta=text, **more)

    def _close(self, *, is_cut: bool) -> Iterator[NamedEvent]:
        self._is_open, item = False, self._blocks[-1]
        item["status"] = "incomplete" if is_cut else "completed"
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            yield self._item_event("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            part = item["content"][0]
            more: Json = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._content_event(f"response.{part['type']}.done", text=part["text"], **more)
            yield self._content_event("response.content_part.done", part=_copy(item)["content"][0])
        yield self._event("response.output_item.done", output_index=len(self._blocks) - 1, item=_copy(item))

    def _end(self, end: AnswerEnd, event: Event) -> Iterator[NamedEvent]:
        status = "incomplete" if end == "length" else "completed"
        self._response = self._state(status)
        yield self._event(f"response.{status}", response=self._response)

    def _content_event(self, name: str, **fields: Any) -> NamedEvent:
        return self._item_event(name, content_index=0, **fields)

    def _item_event(self, name: str, /, **fields: Any) -> NamedEvent:
        return self._event(name, item_id=self._blocks[-1]["id"], output_index=len(self._blocks) - 1, **fields)

    def _event(self, name: str, /, **fields: Any) -> NamedEvent:
        self._num_events += 1
        return NamedEvent(name, {"type": name, "sequence_number": self._num_events - 1, **fields})

    def _state(self, status: str) -> Json:
        """Return the response as it is now."""
        is_complete = status != "in_progress"
        return self._fields | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [_copy(item) for item in self._blocks],
            "usage": _usage(self._usage) if is_complete else None,
        }


_TEXT_TYPES = {"message": "output_text", "reasoning": "reasoning_text"}
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _copy(item: Json) -> Json:
    """Return a copy of an item whose later changes do not change it."""
    parts = [
        part | ({"logprobs": [*part["logprobs"]]} if "logprobs" in part else {}) for part in item.get("content", ())
    ]
    return item | ({"content": parts} if "content" in item else {})


def _usage(usage: TokenUsage) -> Json:
    counts = usage.usage()
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.completion_tokens_details.reasoning_tokens},
        "total_tokens": counts.total_tokens,
    }


def _response_fields(body: ResponsesRequest, model: str) -> Json:
    """Return the fields of a response that repeat the request."""
    text, reasoning = body.text, body.reasoning
    text_format = text.format.model_dump(by_alias=True, exclude_none=True) if text and text.format else {"type": "text"}
    choice = body.tool_choice or "auto"
    return {
        "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()), "model": model,
        "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {}, "output": [], "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None, "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier, "service_tier": "default", "store": False,
        "temperature": body.temperature, "text": {"format": text_format},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()], "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p, "truncation": "disabled", "usage": None, "user": body.user,
    }  # fmt: skip
