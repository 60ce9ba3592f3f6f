"""From the service's events to OpenAI's objects: one class for completions, one for chats.

A `Piece` is what is new of one choice: an event of a stream, or all events of an answer that is sent whole.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


Explained = tuple[int, dict[int, Logprob] | None]  # a token and the log-probabilities at its place


@dataclass
class ChoiceDelta:
    """New text and tokens of choice `index`; with a finish reason the last ones."""

    index: int
    text: str = ""
    tokens: list[Explained] = field(default_factory=list)  # those with log-probabilities
    prompt: tuple[list[int], list[dict[int, Logprob] | None]] = ([], [])  # likewise, the whole prompt's
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, event: Event) -> None:
        self.text += event.text
        if event.logprobs is not None:
            self.tokens += zip(event.token_ids, event.logprobs, strict=True)
        if event.prompt_logprobs is not None:
            self.prompt = event.prompt_token_ids, event.prompt_logprobs
        assert event.finish_reason != "abort", "an aborted output is an error, not an answer"
        assert event.finish_reason != "error"
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason

    @property
    def visible(self) -> bool:
        return bool(self.text or self.tokens or self.finish_reason)


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

    def whole(self, pieces: Sequence[ChoiceDelta], usage: Usage) -> BaseModel:
        return self._chunk([self._choice(piece) for piece in pieces], usage)

    def chunks(self, piece: ChoiceDelta) -> Iterator[BaseModel]:
        if piece.visible:
            yield self._chunk([self._choice(piece)])

    def last(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> BaseModel:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, piece: ChoiceDelta) -> CompletionChoice:
        begins = piece.index not in self._offsets
        echo = self._echoes[piece.index // self._n] if begins and self._echoes else None
        logprobs = self._logprobs(piece, echo)
        return CompletionChoice(
            index=piece.index, text=(echo.text if echo else "") + piece.text, logprobs=logprobs,
            finish_reason=piece.finish_reason, stop_reason=piece.stop_reason,
        )  # fmt: skip

    def _logprobs(self, piece: ChoiceDelta, echo: EchoedPrompt | None) -> CompletionLogprobs | None:
        at = self._offsets.setdefault(piece.index, 0)
        if self._num_top is None:
            return None
        found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, candidates in [*(zip(*piece.prompt, strict=True) if echo else ()), *piece.tokens]:
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
        self._offsets[piece.index] = at
        return found


class Chat:
    """Of /v1/chat/completions; `num_top` candidates each position, None without log-probabilities."""

    def __init__(self, model: str, num_top: int | None) -> None:
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(16)}", int(time.time()), model
        self._num_top = num_top
        self._begun: set[int] = set()

    def whole(self, pieces: Sequence[ChoiceDelta], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=p.index, message=ChatAnswer(content=p.text), logprobs=self._logprobs(p),
                finish_reason=p.finish_reason, stop_reason=p.stop_reason,
            )
            for p in pieces if p.finish_reason is not None
        ]  # fmt: skip
        return ChatCompletion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def chunks(self, piece: ChoiceDelta) -> Iterator[BaseModel]:
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            yield self._chunk([self._choice(ChoiceDelta(piece.index), {"role": "assistant", "content": ""})])
        if piece.visible:
            yield self._chunk([self._choice(piece, {"content": piece.text} if piece.text else {})])

    def last(self, usage: Usage) -> BaseModel:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> BaseModel:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _choice(self, piece: ChoiceDelta, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=piece.index, delta=delta, logprobs=self._logprobs(piece) if piece.tokens else None,
            finish_reason=piece.finish_reason, stop_reason=piece.stop_reason,
        )  # fmt: skip

    def _logprobs(self, piece: ChoiceDelta) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        content = []
        for token, candidates in piece.tokens:
            assert candidates is not None
            top = sorted(candidates.values(), key=lambda c: c.rank)[: self._num_top]
            own = _candidate(candidates[token])
            content.append(TokenCandidates(**own.model_dump(), top_logprobs=[_candidate(c) for c in top]))
        return ChatLogprobs(content=content)


ResponseBuilder = Completions | Chat


def _candidate(found: Logprob) -> Candidate:
    text = found.decoded_token
    return Candidate(
        token=text, logprob=_finite(found.logprob), bytes=None if REPLACEMENT in text else list(text.encode())
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
