"""Messages between front end, leader and followers, encoded as msgpack, never pickle.

    front end --Command--> leader --StepPlan, Stop--> followers
    front end <--Report--- leader

A StepPlan describes a step completely: ranks that execute the same plans in the same order hold the same state.
Arrays are int32 and travel as their bytes.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from .request import Request
from .sampling_params import SamplingParams
from .stats import EngineStats, Profile

FinishReason = Literal["stop", "length", "abort", "error"]


class Admission(msgspec.Struct, frozen=True):
    """A request that takes a slot: its tokens so far, and how to sample the next ones."""

    slot: int
    tokens: np.ndarray  # [L] int32
    num_prompt_tokens: int
    params: SamplingParams
    stop_ids: list[int]
    bad_words: list[list[int]] = []
    state: int = -1  # the recurrent state that the slot's begins with; negative: zero
    num_cached: int = 0  # leading tokens whose keys and values the slot's pages hold already


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step of B rows, each a run of tokens of one slot. A row that reaches the end of its request samples.

    The first `num_decoding` rows decode: they compute one token each and sample the next. None of them reads keys that
    this step stores. An admitted row never counts as decoding: another row of the step may compute its prefix.
    """

    step: int
    admitted: list[Admission]
    slots: np.ndarray  # [B] int32
    starts: np.ndarray  # [B] int32: position of the first token computed
    counts: np.ndarray  # [B] int32: tokens computed, >= 1
    num_decoding: int
    sampled_rows: np.ndarray  # [S] int32: rows at the end of their request, which sample
    state_saves: np.ndarray  # [B * 4] int32, the `saves` of StateRows; empty: none
    # [W * (2 + G)] int32: (slot, index, pages) sets page_table[g, slot, index] = pages[g] for each group g of layers
    page_writes: np.ndarray

    @property
    def is_decode_only(self) -> bool:
        return self.num_decoding == len(self.slots)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position, of the model's own distribution (before penalties and temperature)."""

    token: float
    rank: int  # 1 is the most likely token
    top_ids: list[int]  # the most likely tokens, or SamplingParams.logprob_token_ids
    top: list[float]
    top_ranks: list[int] | None = None  # None: 1, 2, ...


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a prompt's tokens from position `start` on."""

    start: int
    logprobs: list[TokenLogprobs]


class RequestEnd(msgspec.Struct, frozen=True):
    """The end of a request; exactly one per request."""

    uid: int
    reason: FinishReason
    stop_id: int | None = None  # the token id that ended it, for reason "stop"
    error: str | None = None  # reason for a refusal by the engine ("abort") or a failed grammar ("error")


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one step: token tokens[i] for request uids[i], and the requests that ended with it."""

    uids: list[int] = []
    tokens: list[int] = []
    finished: list[RequestEnd] = []
    logprobs: dict[int, TokenLogprobs] = {}  # by uid
    cached_tokens: dict[int, int] = {}  # uid -> prompt tokens found in the prefix cache, when first admitted
    prompt_logprobs: dict[int, PromptLogprobs] = {}  # uid -> a chunk of its prompt
    free_pages: int | None = None  # pages available to requests after this step, unused cached ones included
    num_computed: int = 0  # tokens that the step computed
    prefill_s: dict[int, float] = {}  # uid -> seconds from its admission to its first token, with that token


class Report(msgspec.Struct, frozen=True):
    """The leader's message after a step: its output, the counters, and a profile if one is complete."""

    output: StepOutput
    stats: EngineStats
    profile: Profile | None


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue requests."""

    requests: list[Request]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End requests early."""

    uids: list[int]


class StartProfile(msgspec.Struct, frozen=True, tag=True):
    """Profile the next decode steps."""

    num_steps: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the loops of followers and leader."""


Command = Submit | Cancel | StartProfile | Stop


def _array_to_bytes(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, dtype=np.int32).tobytes()
    raise TypeError(f"{type(value).__name__} cannot be sent between ranks")


def _bytes_to_array(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        return np.frombuffer(value, dtype=np.int32).copy()  # the message's memory is read-only
    raise TypeError(f"{kind.__name__} cannot be sent between ranks")


encode = msgspec.msgpack.Encoder(enc_hook=_array_to_bytes).encode
decode_command = msgspec.msgpack.Decoder(Command, dec_hook=_bytes_to_array).decode
decode_plan = msgspec.msgpack.Decoder(StepPlan | Stop, dec_hook=_bytes_to_array).decode
decode_report = msgspec.msgpack.Decoder(Report, dec_hook=_bytes_to_array).decode
