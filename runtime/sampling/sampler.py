"""Sampling of tokens, identically on every rank: a function of the logits, the request and the position only.

Sampling uses the Gumbel-max trick (`ops.gumbel_argmax`) with noise hashed from the request's seed, the position and
the token. Neither the batch, nor the row, nor earlier samples have any influence. Each rank finds the maximum over its
part of the vocabulary, and the ranks exchange candidates. Top-k needs only each rank's most likely tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...kernels import ops
from ..model.batch import to_device, to_device_together
from ..model.embedding import Logits
from ..plan import Admission
from ..sampling_params import SamplingParams
from .bad_words import BadWords

MAX_CANDIDATES = 64  # candidates of a row where top-k keeps no more; a fixed size makes sums bitwise equal in any batch
MIN_TOP_P = float(np.finfo(np.float32).tiny)  # less would be 0, with which no token is kept
PENALIZED_ROWS = 32  # rows penalized at once, to bound the memory
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the increment of SplitMix64


class Method(IntEnum):
    """The way to sample a row."""

    GUMBEL_MAX = 0  # among all tokens, also greedily
    CANDIDATES = 1  # among the top k tokens, k <= MAX_CANDIDATES
    TOP_P = 2  # top-p and min-p over the whole vocabulary
    SORT = 3  # top-k above MAX_CANDIDATES, over the sorted vocabulary

    @classmethod
    def of(cls, p: SamplingParams) -> Method:
        """Return the cheapest method that gives the distribution of `p`."""
        if p.is_greedy or (p.top_k <= 0 and p.top_p == 1 and p.min_p == 0):
            return cls.GUMBEL_MAX
        if p.top_k <= 0:
            return cls.TOP_P
        return cls.CANDIDATES if p.top_k <= MAX_CANDIDATES else cls.SORT


# Sampling parameters of a slot, or of a row of a batch. Kernels read the first five.
PARAMS = np.dtype(
    [
        ("key", np.int64),  # hash of the seed; in a row, of seed and position
        ("top_k", np.int64),  # 0 for all tokens, also where the method is GUMBEL_MAX
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("logprobs", np.int32),  # most likely tokens to report; -1 for no log-probabilities
        ("prompt_logprobs", np.int32),  # the same for the prompt
        ("num_prompt_tokens", np.int32),
        ("method", np.int8),
        ("is_penalized", np.bool_),
        ("is_edited", np.bool_),  # logits are changed before sampling
        ("needs_full_logits", np.bool_),  # the logits of the whole vocabulary are needed
    ]
)
GREEDY = np.zeros((), PARAMS)  # parameters of an empty slot and of padding
GREEDY["top_p"], GREEDY["logprobs"], GREEDY["prompt_logprobs"] = 1, -1, -1


@dataclass(frozen=True)
class RowParams:
    """The parameters that kernels read, [S] each on the device; the fields of PARAMS with these names."""

    key: Tensor  # int64
    top_k: Tensor  # int64
    temperature: Tensor  # float32
    top_p: Tensor  # float32
    min_p: Tensor  # float32

    def __getitem__(self, rows: Tensor) -> RowParams:
        return RowParams(*(getattr(self, name)[rows] for name in ROW_PARAMS))


ROW_PARAMS = tuple(field.name for field in fields(RowParams))


@dataclass(frozen=True)
class LogitEdits:
    """Changes of one request's logits that the arrays of all slots do not hold."""

    stop_ids: Tensor  # [n] int64, on the device
    first_stop: int  # position from which stop ids may be sampled
    biased_ids: Tensor  # [n] int64
    biases: Tensor  # [n] float32
    allowed_ids: Tensor | None  # [n] int64; None allows all
    bad_words: BadWords | None

    def apply_(self, logits: Tensor, position: int, tokens: Tensor) -> None:
        """Change logits [V] of the token at `position`, in place; `tokens` [L] int32 holds those before it."""
        if len(self.biased_ids):
            logits[self.biased_ids] += self.biases
        if self.allowed_ids is not None:
            allowed = logits[self.allowed_ids]
            logits.fill_(-torch.inf)
            logits[self.allowed_ids] = allowed
        if position < self.first_stop:
            logits[self.stop_ids] = -torch.inf
        if self.bad_words is not None:
            self.bad_words.exclude_(logits, position, tokens)


class Sampler:
    """The sampling parameters of every slot, and the sampling of rows with them."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.params = np.full(max_num_seqs, GREEDY)  # parameters of each slot
        self._edits: list[LogitEdits | None] = [None] * max_num_seqs
        self._logprob_ids: dict[int, Tensor] = {}  # by slot: SamplingParams.logprob_token_ids, [n] int64

    def admit(self, admission: Admission) -> None:
        """Store the parameters of a request that takes a slot; params.seed must be set."""
        p, row = admission.params, np.zeros((), PARAMS)
        assert p.seed is not None, "the front end draws a seed for each request"
        method = Method.of(p)
        row["key"] = _mix(np.array([p.seed % 2**64], np.uint64)).view(np.int64)[0]
        row["top_k"] = 0 if method is Method.GUMBEL_MAX else max(p.top_k, 0)
        for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            row[name] = getattr(p, name)
        row["temperature"] = 0 if p.is_greedy else p.temperature
        row["top_p"] = max(p.top_p, MIN_TOP_P)
        row["logprobs"] = -1 if p.logprobs is None else p.logprobs
        self._logprob_ids.pop(admission.slot, None)
        if p.logprob_token_ids is not None:
            row["logprobs"] = 0
            self._logprob_ids[admission.slot] = torch.tensor(p.logprob_token_ids, device=self.device)
        row["prompt_logprobs"] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        row["num_prompt_tokens"] = admission.num_prompt_tokens
        row["method"] = method
        penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        edited = (
            penalized
            or p.structured_outputs is not None
            or bool(p.logit_bias)
            or p.min_tokens > 0
            or p.allowed_token_ids is not None
            or bool(admission.bad_words)
        )
        row["is_penalized"], row["is_edited"] = penalized, edited
        row["needs_full_logits"] = edited or method >= Method.TOP_P or p.has_logprobs
        self.params[admission.slot] = row
        self._edits[admission.slot] = self._logit_edits(admission) if edited else None

    def rows(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the parameters [S] PARAMS of rows with new tokens at `positions` of `slots`, both [S] int32."""
        params: np.ndarray = self.params.take(slots)  # 2 us for 256 rows; indexing takes 24
        key = params["key"].view(np.uint64)
        params["key"] = _mix(key + GOLDEN * positions.astype(np.uint64)).view(np.int64)
        return params

    def reported_ids(self, slots: np.ndarray) -> dict[int, Tensor]:
        """Return the SamplingParams.logprob_token_ids of the rows that have some, [n] int64 by row."""
        if not self._logprob_ids:
            return {}
        ids = enumerate(map(self._logprob_ids.get, slots.tolist()))
        return {row: of_row for row, of_row in ids if of_row is not None}

    def sample(self, logits: Logits, slots: np.ndarray, positions: np.ndarray, tokens: Tensor) -> Tensor:
        """Return one token per row, [S] int32, the same on every rank.

        logits     of S rows; if any row needs_full_logits they are replicated, and are changed in place
        slots      [S] int32 on the host
        positions  [S] int32 on the host: the position of the new token
        tokens     [slots, L] int32: the tokens of each slot, for the penalties
        """
        params = self.rows(slots, positions)
        penalized = np.flatnonzero(params["is_penalized"])
        for start in range(0, len(penalized), PENALIZED_ROWS):
            self._penalize(logits.shard, penalized[start : start + PENALIZED_ROWS], params, slots, positions, tokens)
        for row in np.flatnonzero(params["is_edited"]).tolist():
            slot = slots[row]
            edits = self._edits[slot]
            assert edits is not None
            edits.apply_(logits.shard[row], int(positions[row]), tokens[slot])
        columns = [np.ascontiguousarray(params[name]) for name in ROW_PARAMS]
        on_device = RowParams(*to_device_together(columns, self.device))
        sampled = torch.empty(len(params), dtype=torch.int32, device=self.device)
        for method, sample in METHODS.items():
            rows = np.flatnonzero(params["method"] == method.value)
            if len(rows) == len(params):
                return sample(logits, on_device)
            if len(rows):
                index = to_device(rows, self.device)
                sampled[index] = sample(logits[index], on_device[index])
        return sampled

    def _logit_edits(self, admission: Admission) -> LogitEdits:
        p = admission.params
        ids = partial(torch.tensor, dtype=torch.int64, device=self.device)
        # The mask of a grammar excludes stop ids before min_tokens.
        first_stop = 0 if p.structured_outputs is not None else admission.num_prompt_tokens + p.min_tokens
        biases = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=self.device)
        allowed = None if p.allowed_token_ids is None else ids(p.allowed_token_ids)
        bad_words = None
        if admission.bad_words:
            bad_words = BadWords.of(admission.bad_words, admission.num_prompt_tokens, self.device)
        return LogitEdits(ids(admission.stop_ids), first_stop, ids(list(p.logit_bias)), biases, allowed, bad_words)

    def _penalize(
        self, logits: Tensor, rows: np.ndarray, params: np.ndarray, slots: np.ndarray, ends: np.ndarray, tokens: Tensor
    ) -> None:
        """Apply the penalties of `rows` to logits [S, V], in place; `ends` [S]: positions of the new tokens.

        Repetition counts prompt and output (Keskar et al., 2019), presence and frequency the output only (OpenAI).
        Takes 8 bytes for each row and token of the vocabulary while it runs.
        """
        columns = [
            *(a.astype(np.int64) for a in (rows, slots[rows], ends[rows], params["num_prompt_tokens"][rows])),
            *(params[f"{name}_penalty"][rows] for name in ("repetition", "presence", "frequency")),
        ]
        index, device_slots, lengths, prompts, *penalties = to_device_together(columns, self.device)
        repetition, presence, frequency = (penalty[:, None] for penalty in penalties)
        length = int(ends[rows].max())
        position = torch.arange(length, device=self.device)
        exists = position < lengths[:, None]
        ids = tokens[device_slots, :length].long() * exists  # the rest may be an earlier request's
        values = logits[index]
        occurs = torch.zeros_like(values).scatter_add_(1, ids, exists.float()) > 0
        counts = torch.zeros_like(values).scatter_add_(1, ids, (exists & (position >= prompts[:, None])).float())
        values = torch.where(occurs, torch.where(values > 0, values / repetition, values * repetition), values)
        logits[index] = values - (frequency * counts + presence * (counts > 0))


def sample_gumbel_max(logits: Logits, p: RowParams) -> Tensor:
    """Sample among all tokens, [S] int32; greedily where the temperature is 0."""
    return logits.gumbel_argmax(p.temperature, p.key)


def sample_candidates(logits: Logits, p: RowParams) -> Tensor:
    """Sample with a top-k of at most MAX_CANDIDATES, [S] int32: the ranks exchange candidates instead of logits."""
    return ops.sample_topk(logits.topk_candidates(MAX_CANDIDATES), p.temperature, p.top_k, p.top_p, p.min_p, p.key)


def _sample_top_p(logits: Logits, p: RowParams) -> Tensor:
    return ops.sample_top_p(logits.shard, p.temperature, p.top_p, p.min_p, p.key)


def _sample_sorted(logits: Logits, p: RowParams) -> Tensor:
    ordered, ids = (logits.shard / p.temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    kept = ops.mask_top_k_top_p(ordered, p.top_k, p.top_p, p.min_p)
    return ops.merge_candidates(ops.gumbel_argmax(kept, torch.ones_like(p.temperature), p.key, tokens=ids.int())[None])


METHODS = {
    Method.GUMBEL_MAX: sample_gumbel_max,
    Method.CANDIDATES: sample_candidates,
    Method.TOP_P: _sample_top_p,
    Method.SORT: _sample_sorted,
}


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the finalizer of SplitMix64 of x, uint64, as `ops.gumbel_argmax` computes it."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
