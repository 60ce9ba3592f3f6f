"""Responses of OpenAI's Responses API, from the parts of one answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.outputs import Event
from .answer_reader import AnswerReader, new_call_id
from .api_errors import ApiError
from .chat_preparation import PreparedChat
from .http_io import NamedEvent
from .logprob_texts import LogprobWriter
from .protocol.responses_models import ResponsesRequest
from .token_usage import TokenUsage

Json = dict[str, Any]


class ResponsesBuilder:
    """Builds the response of one request, streamed or whole; items of the output follow the order of the text."""

    end_of_stream = b""

    def __init__(self, body: ResponsesRequest, model: str, usage: TokenUsage, chat: PreparedChat) -> None:
        self._usage, self._id_length = usage, chat.id_length
        self._reader = AnswerReader(chat, usage)
        self._events = -1  # number of the last event
        self._output: list[Json] = []
        self._item: Json | None = None  # the last of the output while it is not complete
        self._response = _response_fields(body, model)
        self._namespaces = body.namespaces()
        self._logprob_writer = LogprobWriter(body.top_logprobs or 0) if body.has_logprobs else None
        self._logprobs: list[Json] = []  # of tokens whose text has not come yet

    async def stream(
        self, events: AsyncIterator[tuple[int, Event]], *, with_usage: bool = True, in_every_chunk: bool = False
    ) -> AsyncIterator[NamedEvent]:
        """Yield the events of a streamed response; its usage is always in the last one."""
        is_first = True
        async for _, event in events:
            if is_first:
                for name in ("response.created", "response.in_progress"):
                    yield self._event(name, response=self._state("in_progress"))
                is_first = False
            if self._logprob_writer is not None:
                self._logprobs += [entry.model_dump() for entry in self._logprob_writer.chat(event)]
            for part in self._reader.read(event):
                for made in self._add(part):
                    yield made
            end = self._reader.end(event)
            if end is not None:
                is_cut = end == "length"
                for made in self._close("incomplete" if is_cut else "completed"):
                    yield made
                status = "incomplete" if is_cut else "completed"
                yield self._event(f"response.{status}", response=self._state(status))

    async def whole(self, events: AsyncIterator[tuple[int, Event]]) -> list[bytes]:
        """Return the JSON of the response after the last event."""
        response: Json = {}
        async for event in self.stream(events):
            response = event.data.get("response", response)
        return [msgspec.json.encode(response)]

    def failure(self, error: ApiError) -> NamedEvent:
        """Return the event of an error within a stream."""
        detail = error.reply().error
        return self._event("error", code=detail.code, message=detail.message, param=detail.param)

    def _add(self, part: AnswerPart) -> Iterator[NamedEvent]:
        """Yield the events of a part of the answer, with those of the item that it ends or begins."""
        kind = "function_call" if part.kind in ("call", "arguments") else _ITEM_TYPES[part.kind]
        if self._item is None or self._item["type"] != kind or part.kind == "call":
            yield from self._close("completed")
            yield from self._open(kind, part.text)
        item = self._item
        assert item is not None
        if part.kind == "arguments":
            item["arguments"] += part.text
            yield self._item_event("response.function_call_arguments.delta", delta=part.text)
        elif part.kind != "call":
            item["content"][0]["text"] += part.text
            more: Json = {}
            if kind == "message":
                more["logprobs"] = self._logprobs
                item["content"][0]["logprobs"] += self._logprobs
            yield self._content_event(f"response.{_TEXT_TYPES[kind]}.delta", delta=part.text, **more)
        self._logprobs = []

    def _open(self, kind: str, name: str) -> Iterator[NamedEvent]:
        """Begin an item; `name` is that of a called function."""
        item: Json = {"id": f"{_ID_PREFIXES[kind]}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": new_call_id(self._id_length), "name": name, "arguments": ""}
            if name in self._namespaces:
                item["namespace"], item["name"] = self._namespaces[name]
        else:
            more: Json = {"role": "assistant"} if kind == "message" else {"summary": [], "encrypted_content": None}
            item |= more
            item["content"] = []
        self._item = item
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=_copy(item))
        if kind != "function_call":
            lists: Json = {"annotations": [], "logprobs": []} if kind == "message" else {}
            item["content"].append({"type": _TEXT_TYPES[kind], "text": "", **lists})
            yield self._content_event("response.content_part.added", part=_copy(item)["content"][0])

    def _close(self, status: str) -> Iterator[NamedEvent]:
        """End the item that is not complete, if there is one."""
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            yield self._item_event("response.function_call_arguments.done", name=name, arguments=arguments)
        else:
            part = item["content"][0]
            more: Json = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._content_event(f"response.{part['type']}.done", text=part["text"], **more)
            yield self._content_event("response.content_part.done", part=_copy(item)["content"][0])
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=_copy(item))
        self._item = None

    def _content_event(self, name: str, **fields: Any) -> NamedEvent:
        return self._item_event(name, content_index=0, **fields)

    def _item_event(self, name: str, /, **fields: Any) -> NamedEvent:
        assert self._item is not None
        return self._event(name, item_id=self._item["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, name: str, /, **fields: Any) -> NamedEvent:
        self._events += 1
        return NamedEvent(name, {"type": name, "sequence_number": self._events, **fields})

    def _state(self, status: str) -> Json:
        """Return the response as it is now."""
        is_complete = status != "in_progress"
        return self._response | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [_copy(item) for item in self._output],
            "usage": _usage(self._usage) if is_complete else None,
        }


_ITEM_TYPES = {"content": "message", "reasoning": "reasoning"}
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
        "input_tokens_details": {"cached_tokens": counts.prompt_tokens_details.cached_tokens},
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
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "max_tool_calls": None,
        "metadata": body.metadata or {}, "output": [], "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None, "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier, "service_tier": "default", "store": False,
        "temperature": body.temperature, "text": {"format": text_format},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()], "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p, "truncation": "disabled", "usage": None, "user": body.user,
    }  # fmt: skip
