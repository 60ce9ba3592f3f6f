"""The results of generation for users, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from .plan import FinishReason


class Logprob(msgspec.Struct, frozen=True, gc=False):  # an answer has up to 500,000: the collector skips them
    """One candidate at one position."""

    logprob: float
    rank: int  # 1 is the most likely token
    decoded_token: str  # with U+FFFD for a part of a character
    token_bytes: bytes = b""  # the bytes that the token adds to the text; none for a special token that is skipped


PositionLogprobs = list[dict[int, Logprob] | None]  # by token id, for each position; None for the first of a prompt


@dataclass
class CompletionOutput:
    """One of the n outputs of a prompt; `token_ids` includes the token that ended it, `text` does not."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    text_offsets: list[int] | None = None  # with logprobs: where each token begins in `text`, in characters
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string, or the id that is not the model's EOS


@dataclass
class RequestOutput:
    """A prompt and its outputs, `outputs[i]` with seed + i."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    prompt_logprobs: PositionLogprobs | None = None

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)


class Event(msgspec.Struct, frozen=True):  # one for each token: made six times as fast as a frozen dataclass
    """New tokens and text of one output. Each token is in one event; text comes once it is certain."""

    index: int  # index of the output among the n of its prompt
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None  # one entry for each of token_ids, if requested
    finish_reason: FinishReason | None  # set in the last event of this output
    stop_reason: int | str | None  # as in CompletionOutput; the cause for "abort" and "error", if there is one
    prompt_token_ids: list[int]  # the same list in every event of a prompt
    num_cached_tokens: int
    prompt_logprobs: PositionLogprobs | None = None  # the same list in every event of a prompt
    prompt: int = 0  # index of the prompt in the call of LLM.stream
    text_offsets: list[int] | None = None  # as in CompletionOutput, one entry for each of token_ids

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_cut(self) -> bool:
        """True if a limit or a stop string ended the output, which the model would have continued."""
        return self.finish_reason == "length" or (self.finish_reason == "stop" and isinstance(self.stop_reason, str))

    def without_tokens(self) -> Event:
        """Return the event for a request of no tokens, for which the engine has generated one."""
        logprobs = None if self.logprobs is None else list[dict[int, Logprob]]()
        reason = "length" if self.finish_reason in ("stop", "length") else self.finish_reason
        return msgspec.structs.replace(
            self, text="", token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None, text_offsets=[]
        )

    def joined(self, *later: Event) -> Event:
        """Return one event in place of this one and the later ones of the same output."""
        events = [self, *later]
        token_ids = [token for event in events for token in event.token_ids]
        logprobs = None if self.logprobs is None else [entry for event in events for entry in event.logprobs or ()]
        offsets = None if self.text_offsets is None else [i for event in events for i in event.text_offsets or ()]
        text = "".join(event.text for event in events)
        return msgspec.structs.replace(
            events[-1], text=text, token_ids=token_ids, logprobs=logprobs, text_offsets=offsets
        )
