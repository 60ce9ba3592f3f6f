"""Builders of OpenAI's response objects from the engine's events: one class for completions, one for chats.

A response is a stream with one chunk for each event, or one object made of all events of each choice. A chunk with
nothing but text is made as bytes: it is on the path of every token, where pydantic's models take most of the time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import msgspec
from pydantic import BaseModel

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.detokenizer import PromptText
from ...runtime.outputs import Event
from .answer_reader import AnswerFields, AnswerReader, ParsedAnswer, ParsedCall
from .api_errors import ApiError
from .chat_preparation import PreparedChat
from .http_io import make_long
from .logprob_texts import LogprobWriter, likeliest, new_tokens, num_candidates, prompt_logprobs, token_text
from .protocol import reply_models as api
from .token_usage import TokenUsage

LONG_EVENTS = 64  # with more events or candidates, a choice is made in the thread for long answers
LONG_CANDIDATES = 1000  # these take 2 ms
NO_CHOICES = b'"choices":[]'  # no name of a model can contain this: JSON escapes quotes
NOT_ENDED = b'"logprobs":null,"finish_reason":null,"stop_reason":null}'  # the end of the JSON of most choices
to_json = msgspec.json.Encoder().encode

ChoiceEvent = tuple[int, Event]  # (index of the choice, event)


@dataclass(frozen=True)
class ReplyOptions:
    """The parts of a reply that a request asks for beside texts.

    num_top          candidates at each position; None without log-probabilities
    tokens_as_ids    log-probabilities name tokens by their ids
    token_ids        the ids of prompt and output
    prompt_logprobs  candidates at each position of the prompt; None without its log-probabilities
    usage            the last chunk of a stream has the token counts; with usage_in_every_chunk all of them have
    """

    num_top: int | None = None
    tokens_as_ids: bool = False
    token_ids: bool = False
    prompt_logprobs: int | None = None
    usage: bool = False
    usage_in_every_chunk: bool = False


class ReplyBuilder(ABC):
    """Builds the response of one request, streamed or whole."""

    id_prefix: str
    chunk_type: type[BaseModel]
    response_type: type[BaseModel]
    end_of_stream = b"data: [DONE]\n\n"

    def __init__(self, model: str, options: ReplyOptions, usage: TokenUsage) -> None:
        self._id, self._created = f"{self.id_prefix}-{secrets.token_hex(16)}", int(time.time())
        self._model, self._options, self._usage = model, options, usage
        self._logprob_writer = LogprobWriter(options.num_top, options.tokens_as_ids)

    async def stream(self, events: AsyncIterator[ChoiceEvent]) -> AsyncIterator[bytes]:
        """Yield the JSON of the chunks of a stream."""
        with_usage = self._options.usage
        counts = self._usage if with_usage and self._options.usage_in_every_chunk else None
        async for index, event in events:
            choices = self._chunk_choices(index, event)
            if num_candidates(event) > LONG_CANDIDATES:  # those of a prompt, or of a client that reads slowly
                choices = iter(await make_long(partial(list, choices)))
            for choice in choices:
                yield self._chunk(choice, counts)
        if with_usage:
            yield self._chunk(b"", self._usage)

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> list[bytes]:
        """Return the response after the last event, as pieces of JSON: one for each choice, and those around them."""
        by_choice: dict[int, list[Event]] = {}
        async for index, event in events:
            by_choice.setdefault(index, []).append(event)
        choices: list[bytes] = []
        for index, (first, *later) in sorted(by_choice.items()):
            make = partial(self._choice_json, index, first, later)
            is_long = len(later) > LONG_EVENTS or num_candidates(first) > LONG_CANDIDATES
            if choices:
                await asyncio.sleep(0)  # other tasks of the loop do not wait for all choices
            choices += [b"," if choices else b"", await make_long(make) if is_long else make()]
        head, _, tail = (await self._frame(by_choice[min(by_choice)][0])).partition(NO_CHOICES)
        return [head + b'"choices":[', *choices, b"]" + tail]

    async def _frame(self, event: Event) -> bytes:
        """Return the JSON of the response without its choices; `event` is the first one."""
        return self._empty(self.response_type, self._usage)

    def _choice_json(self, index: int, first: Event, later: list[Event]) -> bytes:
        return _model_json(self._choice(index, first.joined(*later)))

    def _chunk(self, choice: bytes, usage: TokenUsage | None) -> bytes:
        """Return the JSON of a chunk with this choice; a stream's last chunk may have none."""
        counts = b"null" if usage is None else usage.json()
        head, before_usage, after_usage = self._around_chunk
        return b"%b%b%b%b%b" % (head, choice, before_usage, counts, after_usage)

    @cached_property
    def _around_chunk(self) -> tuple[bytes, bytes, bytes]:
        """The JSON of a chunk before its choice, up to its usage, and after that."""
        head, _, tail = self._empty(self.chunk_type).partition(NO_CHOICES)
        before_usage, _, after_usage = tail.partition(b"null")
        return head + b'"choices":[', b"]" + before_usage, after_usage

    def failure(self, error: ApiError) -> list[bytes]:
        """Return the JSON of the events of an error within a stream."""
        return [_model_json(error.reply())]

    @abstractmethod
    def _choice(self, index: int, event: Event) -> BaseModel:
        """Return a choice of the whole response from the joined events of its output."""

    @abstractmethod
    def _chunk_choices(self, index: int, event: Event) -> Iterator[bytes]:
        """Yield the JSON of the choices, one for each chunk, that an event adds to a stream."""

    def _empty(self, kind: type[BaseModel], usage: TokenUsage | None = None, **more: Any) -> bytes:
        """Return the JSON of a response or a chunk without choices."""
        counts = usage and usage.usage()
        reply = kind(id=self._id, created=self._created, model=self._model, choices=[], usage=counts, **more)
        return _model_json(reply)

    def _prompt_logprobs(self, event: Event) -> api.PromptLogprobs | None:
        num_top = self._options.prompt_logprobs
        return None if num_top is None else prompt_logprobs(event.prompt_logprobs or [], num_top)


class CompletionBuilder(ReplyBuilder):
    """Builds responses of /v1/completions: `n` choices for each prompt, after its echo if there are `echoes`."""

    id_prefix, response_type = "cmpl", api.Completion
    chunk_type: type[BaseModel] = api.CompletionChunk

    def __init__(
        self, model: str, options: ReplyOptions, usage: TokenUsage, n: int, echoes: Sequence[PromptText]
    ) -> None:
        super().__init__(model, options, usage)
        self._n, self._echoes = n, echoes
        if options.token_ids:
            self.chunk_type = api.CompletionChunkIds
        self._started: set[int] = set()  # indices of the choices that have had a part

    def _chunk_choices(self, index: int, event: Event) -> Iterator[bytes]:
        if self._options.token_ids:
            prompt_ids = None if index in self._started else event.prompt_token_ids
            choice = api.CompletionChunkChoiceIds(
                **self._fields(index, event), prompt_token_ids=prompt_ids, token_ids=event.token_ids
            )
            yield _model_json(choice)
        elif event.logprobs or event.finish_reason or (event.text and self._echoes):
            yield _model_json(api.CompletionChunkChoice(**self._fields(index, event)))
        elif event.text:
            yield b'{"index":%d,"text":%b,%b' % (index, to_json(event.text), NOT_ENDED)

    def _choice(self, index: int, event: Event) -> BaseModel:
        prompt_ids, ids = (event.prompt_token_ids, event.token_ids) if self._options.token_ids else (None, None)
        return api.CompletionChoice(
            **self._fields(index, event), prompt_token_ids=prompt_ids, token_ids=ids,
            prompt_logprobs=self._prompt_logprobs(event),
        )  # fmt: skip

    def _fields(self, index: int, event: Event) -> dict[str, Any]:
        """Return the fields of a choice that it also has in a chunk."""
        prompt = self._echoes[index // self._n] if self._echoes else PromptText("")
        is_first = index not in self._started
        self._started.add(index)
        has_logprobs = self._options.num_top is not None
        return {
            "index": index, "text": prompt.text + event.text if is_first else event.text,
            "logprobs": self._logprobs(event, prompt, with_prompt=is_first) if has_logprobs else None,
            "finish_reason": _finish_reason(event), "stop_reason": event.stop_reason,
        }  # fmt: skip

    def _logprobs(self, event: Event, prompt: PromptText, *, with_prompt: bool) -> api.CompletionLogprobs:
        logprobs = api.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        add_token = self._logprob_writer.add_token
        if with_prompt and prompt.pieces:
            positions = zip(event.prompt_token_ids, event.prompt_logprobs or (), strict=True)
            for (token, candidates), piece, offset in zip(positions, prompt.pieces, prompt.offsets, strict=True):
                text = token_text(piece.decode(errors="replace"), piece)
                top = candidates and likeliest(candidates, self._options.num_top or 0)
                add_token(logprobs, token, text, top, offset)
        for (token, candidates), offset in zip(new_tokens(event), event.text_offsets or (), strict=True):
            text = token_text(candidates[token].decoded_token, candidates[token].token_bytes)
            add_token(logprobs, token, text, candidates, len(prompt.text) + offset)
        return logprobs


class ChatBuilder(ReplyBuilder):
    """Builds responses of /v1/chat/completions; the chunk of an event has all fields that the event adds to."""

    id_prefix, response_type = "chatcmpl", api.ChatCompletion
    chunk_type: type[BaseModel] = api.ChatChunk

    def __init__(
        self, model: str, options: ReplyOptions, usage: TokenUsage, chat: PreparedChat, *, keeps_reasoning: bool = True
    ) -> None:
        super().__init__(model, options, usage)
        self._chunk_choice: type[api.ChatChunkChoice] = api.ChatChunkChoice
        if options.token_ids:
            self.chunk_type, self._chunk_choice = api.ChatChunkIds, api.ChatChunkChoiceIds
        self._prompt_ids: list[int] | None = None  # for the first chunk, before it
        self._chat, self._keeps_reasoning = chat, keeps_reasoning
        self._readers: dict[int, tuple[AnswerReader, AnswerFields]] = {}  # by the index of the choice
        self._parts: dict[int, list[AnswerPart]] = {}  # of each choice, for a whole response

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> list[bytes]:
        """Return the JSON of the response after the last event, in pieces."""
        return await super().whole(self._noted(events))

    def _chunk(self, choice: bytes, usage: TokenUsage | None) -> bytes:
        """Return the JSON of a chunk with this choice; the first one has the ids of the prompt if they are wanted."""
        if self._prompt_ids is None:
            return super()._chunk(choice, usage)
        ids, self._prompt_ids = self._prompt_ids, None
        return self._empty(self.chunk_type, usage, prompt_token_ids=ids).replace(
            NO_CHOICES, b'"choices":[%b]' % choice, 1
        )

    async def _frame(self, event: Event) -> bytes:
        def frame() -> bytes:
            ids = event.prompt_token_ids if self._options.token_ids else None
            more = {"prompt_token_ids": ids, "prompt_logprobs": self._prompt_logprobs(event)}
            return self._empty(self.response_type, self._usage, **more)

        return await make_long(frame) if num_candidates(event) > LONG_CANDIDATES else frame()

    def _chunk_choices(self, index: int, event: Event) -> Iterator[bytes]:
        reader, fields = self._reader(index)
        if index not in self._parts:
            if self._options.token_ids and not self._parts:
                self._prompt_ids = event.prompt_token_ids
            self._parts[index] = []
            self._usage.num_completion -= len(event.token_ids)  # the next chunk has them
            yield _delta_json(index, api.ChatDelta(role="assistant", content=""))
            self._usage.num_completion += len(event.token_ids)
        delta = _delta(fields.sort(reader.read(event)))
        if event.logprobs or event.finish_reason or self._options.token_ids:
            ids: dict[str, Any] = {"token_ids": event.token_ids} if self._options.token_ids else {}
            choice = self._chunk_choice(
                index=index, delta=delta, logprobs=self._logprobs(event) if event.logprobs else None,
                finish_reason=reader.end(event), stop_reason=event.stop_reason, **ids,
            )  # fmt: skip
            yield _model_json(choice)
        elif delta:
            yield _delta_json(index, delta)

    def _choice(self, index: int, event: Event) -> BaseModel:
        reader, fields = self._readers[index]
        answer, finish_reason = fields.sort(self._parts[index]), reader.end(event)
        assert finish_reason is not None, "the engine ends every output with a reason"
        calls = [api.ToolCall(id=c.id, function=api.CalledFunction(name=c.name, arguments=c.arguments))
                 for c in answer.calls.values()]  # fmt: skip
        message = api.ChatAnswer(
            content=None if calls and not answer.content else answer.content, reasoning=answer.reasoning or None,
            reasoning_content=answer.reasoning or None, tool_calls=calls or None,
        )  # fmt: skip
        return api.ChatChoice(
            index=index, message=message, logprobs=self._logprobs(event), finish_reason=finish_reason,
            stop_reason=event.stop_reason, token_ids=event.token_ids if self._options.token_ids else None,
        )  # fmt: skip

    async def _noted(self, events: AsyncIterator[ChoiceEvent]) -> AsyncIterator[ChoiceEvent]:
        """Yield the events, each after its parts have been noted."""
        async for index, event in events:
            self._parts.setdefault(index, []).extend(self._reader(index)[0].read(event))
            yield index, event

    def _reader(self, index: int) -> tuple[AnswerReader, AnswerFields]:
        """Return what reads the events of a choice, and what sorts their parts into fields."""
        if index not in self._readers:
            reader = AnswerReader(self._chat, self._usage, keeps_reasoning=self._keeps_reasoning)
            self._readers[index] = reader, AnswerFields(self._chat.id_length)
        return self._readers[index]

    def _logprobs(self, event: Event) -> api.ChatLogprobs | None:
        if self._options.num_top is None:
            return None
        return api.ChatLogprobs(content=self._logprob_writer.chat(event))


def _model_json(model: BaseModel) -> bytes:
    return model.model_dump_json().encode()


def _delta_json(index: int, delta: api.ChatDelta) -> bytes:
    """Return the JSON of the choice of a chunk with nothing but this delta."""
    return b'{"index":%d,"delta":%b,%b' % (index, to_json(delta), NOT_ENDED)


def _delta(answer: ParsedAnswer) -> api.ChatDelta:
    """Return the delta of a chunk; the first part of a call has its id and name."""
    delta = api.ChatDelta()
    if answer.content:
        delta["content"] = answer.content
    if answer.reasoning:
        delta["reasoning"] = delta["reasoning_content"] = answer.reasoning
    if answer.calls:
        delta["tool_calls"] = [_call_delta(index, call) for index, call in answer.calls.items()]
    return delta


def _call_delta(index: int, call: ParsedCall) -> api.ToolCallDelta:
    if not call.id:
        return api.ToolCallDelta(index=index, function=api.FunctionDelta(arguments=call.arguments))
    function = api.FunctionDelta(name=call.name, arguments=call.arguments)
    return api.ToolCallDelta(index=index, id=call.id, type="function", function=function)


def _finish_reason(event: Event) -> api.FinishReason | None:
    assert event.finish_reason != "abort", "Handlers raises an error instead"
    assert event.finish_reason != "error"
    return event.finish_reason
