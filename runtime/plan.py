"""What travels between the front end, the leader and the followers: msgpack structs, never pickle.

    front end --Request, cancel--> leader --StepPlan--> followers
    front end <------Report------- leader

A StepPlan is the whole truth about a step: a rank that executes the same plans in the same order holds the same state.
Arrays are int32 and travel as their bytes.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from .request import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Admission(msgspec.Struct, frozen=True):
    """A request takes a slot: its tokens so far and how to sample the next ones."""

    slot: int
    tokens: np.ndarray  # [L] int32
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, tag=True):
    """One step: B rows, each a run of tokens of one slot; those at the end of their request sample the next token."""

    step: int
    admitted: list[Admission]
    slots: np.ndarray  # [B] int32
    starts: np.ndarray  # [B] int32: position of the first token computed
    counts: np.ndarray  # [B] int32: tokens computed, >= 1
    sampled_rows: np.ndarray  # [S] int32: rows whose last token has no successor yet
    page_writes: (
        np.ndarray
    )  # [W * 3] int32, triples (slot, index, page): page_table[slot, index] = page, before the step

    @property
    def num_decoding(self) -> int:
        """How many rows come first that have one token and were there before: none of them reads what this step stores.

        Not so an admitted row, of whatever length: the prefix that it shares may be another row's in this very step.
        """
        longer = np.flatnonzero(self.counts[: len(self.counts) - len(self.admitted)] > 1)
        return int(longer[0]) if len(longer) else len(self.counts) - len(self.admitted)

    @property
    def is_decode_only(self) -> bool:
        """Whether all rows are decoding requests: else the last row is new, or a chunk of a prompt."""
        return self.num_decoding == len(self.counts)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, of the model's own distribution (before penalties and temperature)."""

    token: float
    rank: int  # 1 is the most likely token
    top_ids: list[int]
    top: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True):
    """What the model thinks of a prompt's tokens from position `start` on, each after those before it."""

    start: int
    logprobs: list[TokenLogprobs]


class Finished(msgspec.Struct, frozen=True):
    """A request ended; exactly one per request."""

    uid: int
    reason: FinishReason
    stop_id: int | None = None  # the token id that ended it, for reason "stop"
    error: str | None = None  # why: the engine refused it ("abort"), or its grammar could not go on ("error")


class StepOutput(msgspec.Struct, frozen=True):
    """What one step produced: token tokens[i] for request uids[i], and who ended with it."""

    uids: list[int]
    tokens: list[int]
    finished: list[Finished]
    logprobs: dict[int, TokenLogprobs] = {}
    cached: dict[int, int] = {}  # uid -> prompt tokens found in the prefix cache, when first admitted
    prompts: dict[int, PromptLogprobs] = {}  # uid -> a chunk of its prompt, if its log-probabilities are wanted
    free_pages: int | None = None  # that requests could have after this step, cached ones that nobody uses included
