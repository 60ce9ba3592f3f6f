"""Requests: prompts and their senders, as the front end and the scheduler pass them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import msgspec
import numpy as np

from .sampling_params import SamplingParams


class Origin(NamedTuple):
    """The sender of a prompt, in arbitrary numbers: the scheduler is fair between clients, and between their calls.

    A call is one HTTP request, which may have several prompts with n outputs each.
    """

    client: int = 0
    call: int = 0
    priority: int = 0  # the lowest goes first


NO_ORIGIN = Origin()


class PromptFields(TypedDict, total=False):
    """A prompt with vLLM's names: either `prompt` or `prompt_token_ids`, and a `cache_salt` if it has one.

    Only prompts with the same salt share what is in the prefix cache.
    """

    prompt: str
    prompt_token_ids: Sequence[int]
    cache_salt: str


class Request(msgspec.Struct, frozen=True):
    """One output to generate, the unit that the scheduler admits: a prompt with n > 1 makes n requests.

    `tokens` are the prompt and, for a request that is submitted again, its generated tokens. `stop_ids` end the output;
    they include the EOS ids unless these are ignored. params.seed and params.max_tokens are set, and params.n is 1.
    `client`, `call` and `priority` are those of its Origin. `bad_words` are the token sequences of params.bad_words.
    Only requests with the same `cache_salt` share cached prefixes.
    """

    uid: int
    tokens: np.ndarray  # [L] int32
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: list[int]
    client: int = 0
    call: int = 0
    priority: int = 0
    bad_words: list[list[int]] = []
    cache_salt: str | None = None

    @property
    def max_length(self) -> int:
        """Prompt plus longest output, in tokens."""
        assert self.params.max_tokens is not None
        return self.num_prompt_tokens + self.params.max_tokens


class RequestRefused(ValueError):
    """A prompt or its parameters cannot run; nothing was started."""
