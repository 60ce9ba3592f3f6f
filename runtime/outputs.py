"""What a user gets back; the names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

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
