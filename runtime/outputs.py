"""What a user gets back; the names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .plan import FinishReason


@dataclass(frozen=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    rank: int  # 1 is the most likely token
    decoded_token: str


@dataclass
class CompletionOutput:
    """One of the n outputs of a prompt; `token_ids` include the token that ended it, `text` does not."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string, or the id that is not the model's EOS


@dataclass
class RequestOutput:
    """A prompt and its outputs, `outputs[i]` with seed + i."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # one for each prompt token; None for the first

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)


@dataclass(frozen=True)
class Delta:
    """New text of one output: outputs[output] of prompts[prompt]; `finished` with the last one."""

    prompt: int
    output: int
    text: str
    finished: bool


class Event(msgspec.Struct, frozen=True):  # one for each token: made six times as fast as a frozen dataclass
    """What is new of one output since its last event; each token is in one, text comes once it is certain."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None  # one for each of token_ids, if they were asked for
    finish_reason: FinishReason | None  # with the last event of this output
    stop_reason: int | str | None  # as in CompletionOutput; for "abort" and "error" why, if there is something to tell
    prompt_token_ids: list[int]  # the same list in every event of a generation
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # as in RequestOutput, likewise in every event

    def joined(self, later: Event) -> Event:
        """One event in place of this and the next one of the same output."""
        logprobs = None if self.logprobs is None or later.logprobs is None else self.logprobs + later.logprobs
        together = {"text": self.text + later.text, "token_ids": self.token_ids + later.token_ids, "logprobs": logprobs}
        return msgspec.structs.replace(later, **together)
