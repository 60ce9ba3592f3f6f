"""OpenAI's objects from the engine's events: one class for completions, one for chats.

A stream sends one chunk for each event of a choice; a whole answer has one event for each choice, joined from all.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from ...runtime.outputs import Event, Logprob
from .protocol.response_models import (
    Candidate,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    TokenCandidates,
    Usage,
)

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own figure
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that comes before its answer: its text, and that of its first token, which nothing has predicted."""

    text: str
    first: str


class Completions:
    """Of /v1/completions. `echoes` are the prompts, or none, `num_top` candidates each position."""

    def __init__(self, model: str, n: int, echoes: Sequence[EchoedPrompt], num_top: int | None) -> None:
        self._id, self._created, self._model = f"cmpl-{secrets.token_hex(16)}", int(time.time()), model
        self._n, self._num_top = n, num_top
        self._echoes = echoes
        self._offsets: dict[int, int] = {}  # of each choice: characters of the tokens that were given

    def whole(self, events: Sequence[Event], usage: Usage) -> BaseModel:
        return self._chunk([self._choice(choice, event) for choice, event in enumerate(events)], usage)

    def chunks(self, choice: int, event: Event) -> Iterator[BaseModel]:
        if _is_visible(event):
            yield self._chunk([self._choice(choice, event)])

    def last(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> BaseModel:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, choice: int, event: Event) -> CompletionChoice:
        begins = choice not in self._offsets
        echo = self._echoes[choice // self._n] if begins and self._echoes else None
        logprobs = self._logprobs(choice, event, echo)
        return CompletionChoice(
            index=choice, text=(echo.text if echo else "") + event.text, logprobs=logprobs,
            finish_reason=_finish_reason(event), stop_reason=event.stop_reason,
        )  # fmt: skip

    def _logprobs(self, choice: int, event: Event, echo: EchoedPrompt | None) -> CompletionLogprobs | None:
        at = self._offsets.setdefault(choice, 0)
        if self._num_top is None:
            return None
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        prompt = _with_logprobs(event.prompt_token_ids, event.prompt_logprobs) if echo else []
        for token, candidates in [*prompt, *_with_logprobs(event.token_ids, event.logprobs)]:
            if candidates is None:
                assert echo is not None, "a prompt's first token"
                text, logprob, table = echo.first, None, None
            else:
                text, logprob = candidates[token].decoded_token, _finite(candidates[token].logprob)
                top = sorted(candidates.values(), key=lambda c: -c.rank)  # of equal texts the likelier one stays
                table = {c.decoded_token: _finite(c.logprob) for c in top}
            found.tokens.append(text)
            found.token_logprobs.append(logprob)
            found.top_logprobs.append(table)
            found.text_offset.append(at)
            at += len(text)
        self._offsets[choice] = at
        return found


class Chat:
    """Of /v1/chat/completions; `num_top` candidates each position, None without log-probabilities."""

    def __init__(self, model: str, num_top: int | None) -> None:
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(16)}", int(time.time()), model
        self._num_top = num_top
        self._begun: set[int] = set()

    def whole(self, events: Sequence[Event], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=choice, message=ChatAnswer(content=event.text), logprobs=self._logprobs(event),
                finish_reason=finish_reason, stop_reason=event.stop_reason,
            )
            for choice, event in enumerate(events) if (finish_reason := _finish_reason(event)) is not None
        ]  # fmt: skip
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def chunks(self, choice: int, event: Event) -> Iterator[BaseModel]:
        if choice not in self._begun:
            self._begun.add(choice)
            role: ChatDelta = {"role": "assistant", "content": ""}
            first = ChatChunkChoice(index=choice, delta=role, logprobs=None, finish_reason=None, stop_reason=None)
            yield self._chunk([first])
        if _is_visible(event):
            yield self._chunk([self._choice(choice, event)])

    def last(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> BaseModel:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, choice: int, event: Event) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=choice, delta={"content": event.text} if event.text else {},
            logprobs=self._logprobs(event) if event.logprobs else None,
            finish_reason=_finish_reason(event), stop_reason=event.stop_reason,
        )  # fmt: skip

    def _logprobs(self, event: Event) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        content = []
        for token, candidates in _with_logprobs(event.token_ids, event.logprobs):
            assert candidates is not None
            top = sorted(candidates.values(), key=lambda c: c.rank)[: self._num_top]
            own = _candidate(candidates[token])
            content.append(TokenCandidates(**own.model_dump(), top_logprobs=[_candidate(c) for c in top]))
        return ChatLogprobs(content=content)


ResponseBuilder = Completions | Chat


def _with_logprobs(
    tokens: Sequence[int], logprobs: Sequence[dict[int, Logprob] | None] | None
) -> list[tuple[int, dict[int, Logprob] | None]]:
    """Return each token with the log-probabilities at its position; none if they were not requested."""
    return [] if logprobs is None else list(zip(tokens, logprobs, strict=True))


def _is_visible(event: Event) -> bool:
    return bool(event.text or event.logprobs or event.finish_reason)


def _finish_reason(event: Event) -> FinishReason | None:
    assert event.finish_reason != "abort", "an aborted output is an error, not an answer"
    assert event.finish_reason != "error"
    return event.finish_reason


def _candidate(found: Logprob) -> Candidate:
    text = found.decoded_token
    return Candidate(
        token=text, logprob=_finite(found.logprob), bytes=None if REPLACEMENT in text else list(text.encode())
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
