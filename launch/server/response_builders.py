"""Builders of OpenAI's response objects from the engine's events: one class for completions, one for chats.

A response is a stream with one chunk for each event, or one object made of all events of each choice.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial

from pydantic import BaseModel

from ...runtime.chat.call_readers import AnswerPart
from ...runtime.detokenizer import PromptText
from ...runtime.outputs import Event, Logprob
from .answer_reader import AnswerFields, AnswerReader, ParsedAnswer, ParsedCall
from .answer_thread import make_long
from .api_errors import ApiError
from .chat_preparation import PreparedChat
from .protocol import response_models as api
from .token_usage import TokenUsage

LONG_EVENTS = 64  # with more events or candidates, a choice is made in the thread for long answers
LONG_CANDIDATES = 1000  # these take 2 ms
MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON does not have
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

ChoiceEvent = tuple[int, Event]  # (index of the choice, event)


class ResponseBuilder(ABC):
    """Builds the response of one request, streamed or whole."""

    id_prefix: str
    chunk_type: type[BaseModel]
    response_type: type[BaseModel]
    end_of_stream = b"data: [DONE]\n\n"

    def __init__(self, model: str, num_top: int | None, usage: TokenUsage) -> None:
        self._id, self._created = f"{self.id_prefix}-{secrets.token_hex(16)}", int(time.time())
        self._model, self._usage = model, usage
        self._num_top = num_top  # number of candidates at each position; None without log-probabilities

    async def stream(
        self, events: AsyncIterator[ChoiceEvent], *, with_usage: bool, in_every_chunk: bool = False
    ) -> AsyncIterator[BaseModel]:
        """Yield the chunks of a streamed response; `with_usage` the last or every chunk holds the token counts."""
        counts = self._usage if with_usage and in_every_chunk else None
        async for index, event in events:
            for choice in await self._new_choices(index, event):
                yield self._make(self.chunk_type, [choice], counts)
        if with_usage:
            yield self._make(self.chunk_type, [], self._usage)

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> list[bytes]:
        """Return the response after the last event, as pieces of JSON: one for each choice, and those around them."""
        by_choice: dict[int, list[Event]] = {}
        async for index, event in events:
            by_choice.setdefault(index, []).append(event)
        choices: list[bytes] = []
        for index, (first, *later) in sorted(by_choice.items()):
            make = partial(self._choice_json, index, first, later)
            is_long = len(later) > LONG_EVENTS or _num_candidates(first) > LONG_CANDIDATES
            choices += [b"," if choices else b"", await make_long(make) if is_long else make()]
        reply = self._make(self.response_type, [], self._usage).model_dump_json().encode()
        head, _, tail = reply.partition(b'"choices":[]')
        return [head + b'"choices":[', *choices, b"]" + tail]

    async def _new_choices(self, index: int, event: Event) -> list[BaseModel]:
        if _num_candidates(event) > LONG_CANDIDATES:  # those of a prompt, or of a client that reads slowly
            return await make_long(lambda: list(self._chunk_choices(index, event)))
        return list(self._chunk_choices(index, event))

    def _choice_json(self, index: int, first: Event, later: list[Event]) -> bytes:
        return self._choice(index, first.joined(*later)).model_dump_json().encode()

    def failure(self, error: ApiError) -> BaseModel:
        """Return the event of an error within a stream."""
        return error.reply()

    @abstractmethod
    def _choice(self, index: int, event: Event) -> BaseModel:
        """Return a choice of the whole response from the joined events of its output."""

    @abstractmethod
    def _chunk_choices(self, index: int, event: Event) -> Iterator[BaseModel]:
        """Yield the choices, one for each chunk, that an event adds to a stream."""

    def _make(self, kind: type[BaseModel], choices: list[BaseModel], usage: TokenUsage | None = None) -> BaseModel:
        counts = usage and usage.usage()
        return kind(id=self._id, created=self._created, model=self._model, choices=choices, usage=counts)


class CompletionBuilder(ResponseBuilder):
    """Builds responses of /v1/completions: `n` choices for each prompt, after its echo if there are `echoes`."""

    id_prefix, chunk_type, response_type = "cmpl", api.Completion, api.Completion

    def __init__(
        self, model: str, num_top: int | None, usage: TokenUsage, n: int, echoes: Sequence[PromptText]
    ) -> None:
        super().__init__(model, num_top, usage)
        self._n, self._echoes = n, echoes
        self._started: set[int] = set()  # indices of the choices that have had a part

    def _chunk_choices(self, index: int, event: Event) -> Iterator[BaseModel]:
        if event.text or event.logprobs or event.finish_reason:
            yield self._choice(index, event)

    def _choice(self, index: int, event: Event) -> BaseModel:
        prompt = self._echoes[index // self._n] if self._echoes else PromptText("")
        is_first = index not in self._started
        self._started.add(index)
        return api.CompletionChoice(
            index=index, text=prompt.text + event.text if is_first else event.text,
            logprobs=None if self._num_top is None else self._logprobs(event, prompt, with_prompt=is_first),
            finish_reason=_finish_reason(event), stop_reason=event.stop_reason,
        )  # fmt: skip

    def _logprobs(self, event: Event, prompt: PromptText, *, with_prompt: bool) -> api.CompletionLogprobs:
        logprobs = api.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if with_prompt and prompt.pieces:
            positions = zip(event.prompt_token_ids, event.prompt_logprobs or (), strict=True)
            for (token, candidates), piece, offset in zip(positions, prompt.pieces, prompt.offsets, strict=True):
                _add_token(logprobs, _token_text(piece.decode(errors="replace"), piece), token, candidates, offset)
        for (token, candidates), offset in zip(_tokens(event), event.text_offsets or (), strict=True):
            text = _token_text(candidates[token].decoded_token, candidates[token].token_bytes)
            _add_token(logprobs, text, token, candidates, len(prompt.text) + offset)
        return logprobs


class ChatBuilder(ResponseBuilder):
    """Builds responses of /v1/chat/completions; the chunk of an event has all fields that the event adds to."""

    id_prefix, chunk_type, response_type = "chatcmpl", api.ChatChunk, api.ChatCompletion

    def __init__(
        self, model: str, num_top: int | None, usage: TokenUsage, chat: PreparedChat, *, keeps_reasoning: bool = True
    ) -> None:
        super().__init__(model, num_top, usage)
        self._chat, self._keeps_reasoning = chat, keeps_reasoning
        self._readers: dict[int, tuple[AnswerReader, AnswerFields]] = {}  # by the index of the choice
        self._parts: dict[int, list[AnswerPart]] = {}  # of each choice, for a whole response

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> list[bytes]:
        """Return the JSON of the response after the last event, in pieces."""
        return await super().whole(self._noted(events))

    def _chunk_choices(self, index: int, event: Event) -> Iterator[BaseModel]:
        reader, fields = self._reader(index)
        if index not in self._parts:
            self._parts[index] = []
            role = api.ChatDelta(role="assistant", content="")
            yield api.ChatChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None, stop_reason=None)
        delta = _delta(fields.sort(reader.read(event)))
        if delta or event.logprobs or event.finish_reason:
            yield api.ChatChunkChoice(
                index=index, delta=delta, logprobs=self._logprobs(event) if event.logprobs else None,
                finish_reason=reader.end(event), stop_reason=event.stop_reason,
            )  # fmt: skip

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
            stop_reason=event.stop_reason,
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
        if self._num_top is None:
            return None
        content = []
        for token, candidates in _tokens(event):
            top = sorted(candidates.values(), key=lambda c: c.rank)[: self._num_top]
            sampled = _candidate(candidates[token]).model_dump()
            content.append(api.TokenCandidates(**sampled, top_logprobs=[_candidate(c) for c in top]))
        return api.ChatLogprobs(content=content)


def _delta(answer: ParsedAnswer) -> api.ChatDelta:
    """Return the delta of a chunk; the first part of a call has its id and name."""
    delta = api.ChatDelta()
    if answer.content:
        delta["content"] = answer.content
    if answer.reasoning:
        delta["reasoning_content"] = delta["reasoning"] = answer.reasoning
    if answer.calls:
        delta["tool_calls"] = [_call_delta(index, call) for index, call in answer.calls.items()]
    return delta


def _call_delta(index: int, call: ParsedCall) -> api.ToolCallDelta:
    if not call.id:
        return api.ToolCallDelta(index=index, function=api.FunctionDelta(arguments=call.arguments))
    function = api.FunctionDelta(name=call.name, arguments=call.arguments)
    return api.ToolCallDelta(index=index, id=call.id, type="function", function=function)


def _num_candidates(event: Event) -> int:
    positions = [*(event.prompt_logprobs or ())[-1:], *(event.logprobs or ())[:1]]
    num_positions = len(event.prompt_logprobs or ()) + len(event.logprobs or ())
    return num_positions * max((len(candidates or ()) for candidates in positions), default=0)


def _tokens(event: Event) -> list[tuple[int, dict[int, Logprob]]]:
    """Return the new tokens with their candidates; none without log-probabilities."""
    return list(zip(event.token_ids, event.logprobs, strict=True)) if event.logprobs else []


def _finish_reason(event: Event) -> api.FinishReason | None:
    assert event.finish_reason != "abort", "Handlers raises an error instead"
    assert event.finish_reason != "error"
    return event.finish_reason


def _add_token(
    logprobs: api.CompletionLogprobs, text: str, token: int, candidates: dict[int, Logprob] | None, offset: int
) -> None:
    """Add a token; only the first one of a prompt has no candidates."""
    logprobs.tokens.append(text)
    logprobs.token_logprobs.append(_finite(candidates[token].logprob) if candidates else None)
    logprobs.top_logprobs.append(_top_logprobs(text, token, candidates) if candidates else None)
    logprobs.text_offset.append(offset)


def _top_logprobs(text: str, token: int, candidates: dict[int, Logprob]) -> dict[str, float]:
    """Return the log-probabilities by text, the sampled token first; a token with a text that is taken is named by id.

    The sampled token has the same text here as in `tokens`: evaluations look it up, to see if it is the likeliest.
    """
    top = {text: _finite(candidates[token].logprob)}
    for other, logprob in sorted(candidates.items(), key=lambda item: item[1].rank):
        if other != token:
            name = _token_text(logprob.decoded_token, logprob.token_bytes)
            top[f"token_id:{other}" if name in top else name] = _finite(logprob.logprob)
    return top


def _token_text(text: str, piece: bytes, prefix: str = "bytes:") -> str:
    """Return the text of a token, as OpenAI writes it for a part of a character: `bytes:\\xe2\\x82`."""
    if REPLACEMENT not in text or _is_utf8(piece):
        return text
    return prefix + piece.decode(errors="backslashreplace")


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _candidate(logprob: Logprob) -> api.Candidate:
    text = _token_text(logprob.decoded_token, logprob.token_bytes, prefix="")
    return api.Candidate(token=text, logprob=_finite(logprob.logprob), bytes=list(logprob.token_bytes))


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
