"""From logits to tokens, the same on every rank: a function of the logits, the request and the position only.

A random sample is `ops.gumbel_argmax`: the token v with the least E(v) / p(v), E(v) being exponential noise hashed
from the request's seed, the position and v. So neither the batch, nor the row, nor earlier samples have any influence,
and a rank samples from its part of the vocabulary. Top-k needs no more than each rank's best tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...kernels import ops
from ..model.batch import to_device, to_device_together
from ..model.logits import Logits
from ..plan import Admission, TokenLogprobs
from ..request import SamplingParams

RACE, FEW, NUCLEUS, SORTED = range(4)  # ways to draw; from NUCLEUS on the whole vocabulary is needed
CANDIDATES = 64  # of a row, where top-k keeps no more; one number, so that sums have the same bits in any batch
PENALIZED = 32  # rows at once
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the increment of SplitMix64


@dataclass(frozen=True)
class SlotState:
    """What sampling needs to know of the request in a slot."""

    params: SamplingParams
    stop_ids: Tensor  # [n] int64, on the device
    biased: Tensor  # [n] int64: the tokens of logit_bias
    biases: Tensor  # [n] float32


@dataclass(frozen=True)
class Bounds:
    """What each row's draw depends on besides its logits, [S] on the device."""

    keys: Tensor  # int64: hashes of seed and position
    top_k: Tensor  # int64, 0 for all: also of who is greedy
    temperature: Tensor  # float32, as the rest
    top_p: Tensor
    min_p: Tensor

    def __getitem__(self, rows: Tensor) -> Bounds:
        return Bounds(self.keys[rows], self.top_k[rows], self.temperature[rows], self.top_p[rows], self.min_p[rows])


class Sampler:
    """The sampling parameters of every slot, in arrays for what all rows have and in SlotState for the rest."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.slots: list[SlotState | None] = [None] * max_num_seqs
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_p, self.min_p = np.ones(max_num_seqs, np.float32), np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.seed = np.zeros(max_num_seqs, np.uint64)
        self.way = np.full(max_num_seqs, RACE, np.int8)
        self.edited = np.zeros(max_num_seqs, bool)  # logits are changed before sampling
        self.repetition, self.presence, self.frequency = (np.zeros(max_num_seqs, np.float32) for _ in range(3))
        self.penalized = np.zeros(max_num_seqs, bool)
        self.logprobs = np.full(max_num_seqs, -1, np.int32)
        self.prompt_logprobs = np.full(max_num_seqs, -1, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)

    def admit(self, admission: Admission) -> None:
        """Take over the parameters of a request that has been given a slot; params.seed must be set."""
        slot, p = admission.slot, admission.params
        assert p.seed is not None, "the front end draws a seed for each request"
        ids = partial(torch.tensor, dtype=torch.int64, device=self.device)
        biases = torch.tensor(list(p.logit_bias.values()), dtype=torch.float32, device=self.device)
        self.slots[slot] = SlotState(p, ids(admission.stop_ids), ids(list(p.logit_bias)), biases)
        self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
        self.way[slot] = way = _way(p)
        self.top_k[slot], self.seed[slot] = 0 if way == RACE else max(p.top_k, 0), p.seed % 2**64
        self.repetition[slot] = p.repetition_penalty
        self.presence[slot], self.frequency[slot] = p.presence_penalty, p.frequency_penalty
        penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        guided = p.structured_outputs is not None  # its logits come masked
        self.penalized[slot] = penalized
        self.edited[slot] = guided or penalized or bool(p.logit_bias) or p.min_tokens > 0
        self.logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        self.prompt_logprobs[slot] = -1 if p.prompt_logprobs is None else p.prompt_logprobs
        self.num_prompt_tokens[slot] = admission.num_prompt_tokens

    def sample(self, logits: Logits, slots: np.ndarray, positions: np.ndarray, tokens: Tensor) -> Tensor:
        """One token per row; [S] int32, the same on every rank.

        logits     of S rows; replicated if these requests need all, and then they may be written to
        slots      [S]    int32, on the host: the request of each row
        positions  [S]    int32, on the host: the place that the new token will take
        tokens     [slots, L] int32: what each slot holds so far, for the penalties
        """
        penalized = np.flatnonzero(self.penalized[slots])
        for first in range(0, len(penalized), PENALIZED):
            self._penalize(logits.shard, penalized[first : first + PENALIZED], slots, positions, tokens)
        for row in np.flatnonzero(self.edited[slots]).tolist():
            self._edit(logits.shard[row], int(slots[row]), int(positions[row]))
        bounds = Bounds(*to_device_together(self.bounds(slots, positions), self.device))
        ways = self.way[slots]
        chosen = torch.empty(len(slots), dtype=torch.int32, device=self.device)
        for way, draw in enumerate((race, draw_among_few, _nucleus, _sorted)):
            rows = np.flatnonzero(ways == way)
            if len(rows) == len(slots):
                return draw(logits, bounds)
            if len(rows):
                index = to_device(rows, self.device)
                chosen[index] = draw(logits[index], bounds[index])
        return chosen

    def bounds(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """The fields of Bounds [S], on the host."""
        keys = _mix(_mix(self.seed[slots]) + GOLDEN * positions.astype(np.uint64)).view(np.int64)
        return keys, self.top_k[slots], self.temperature[slots], self.top_p[slots], self.min_p[slots]

    def draws_among_few(self, slots: np.ndarray) -> bool:
        """Whether any of these requests draws among the greatest logits only."""
        return bool((self.way[slots] == FEW).any())

    def needs_all(self, slots: np.ndarray) -> bool:
        """Whether any of these requests needs the logits of the whole vocabulary."""
        return bool((self.edited[slots] | (self.way[slots] >= NUCLEUS) | (self.logprobs[slots] >= 0)).any())

    def top_logprobs(self, logits: Tensor, chosen: Tensor, slots: np.ndarray) -> Callable[[], dict[int, TokenLogprobs]]:
        """Log-probabilities for the rows whose requests ask for them (one at least), by row.

        logits  [S, V] as the model gave them. The returned function waits for the device.
        """
        rows, widths = np.flatnonzero(self.logprobs[slots] >= 0), self.logprobs[slots]
        index = torch.from_numpy(rows).to(self.device)
        logprobs = logits[index].log_softmax(-1)
        own = logprobs.gather(1, chosen[index, None].long())
        ranks = (logprobs > own).sum(-1) + 1
        top, ids = logprobs.topk(min(int(self.logprobs[slots].max()), logits.shape[1]), dim=-1)

        def collect() -> dict[int, TokenLogprobs]:
            table = zip(rows.tolist(), own[:, 0].tolist(), ranks.tolist(), ids.tolist(), top.tolist(), strict=True)
            return {row: TokenLogprobs(t, r, i[: widths[row]], p[: widths[row]]) for row, t, r, i, p in table}

        return collect

    def _penalize(
        self, logits: Tensor, rows: np.ndarray, slots: np.ndarray, positions: np.ndarray, tokens: Tensor
    ) -> None:
        """Repetition counts prompt and output (Keskar et al., 2019), presence and frequency the output (OpenAI).

        Changes these rows of logits [S, V]; takes 8 bytes a row and token of the vocabulary for a while.
        """
        own, length = slots[rows], int(positions[rows].max())
        of_rows = (
            rows,
            own.astype(np.int64),
            positions[rows].astype(np.int64),
            self.num_prompt_tokens[own].astype(np.int64),
        )
        penalties = self.repetition[own], self.presence[own], self.frequency[own]
        index, which, ends, prompts, *given = to_device_together((*of_rows, *penalties), self.device)
        repetition, presence, frequency = (penalty[:, None] for penalty in given)
        place = torch.arange(length, device=self.device)
        there = place < ends[:, None]
        held = tokens[which, :length].long() * there  # the rest may be a previous owner's
        values = logits[index]
        seen = torch.zeros_like(values).scatter_add_(1, held, there.float()) > 0
        counts = torch.zeros_like(values).scatter_add_(1, held, (there & (place >= prompts[:, None])).float())
        values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
        logits[index] = values - (frequency * counts + presence * (counts > 0))

    def _edit(self, logits: Tensor, slot: int, position: int) -> None:
        """Logit bias and min_tokens on one row [V], in place."""
        state = self.slots[slot]
        assert state is not None
        if len(state.biased):
            logits[state.biased] += state.biases
        may_stop = position >= self.num_prompt_tokens[slot] + state.params.min_tokens
        if not may_stop and state.params.structured_outputs is None:  # else runtime/guide.py has seen to it
            logits[state.stop_ids] = -torch.inf


def race(logits: Logits, bounds: Bounds) -> Tensor:
    return logits.race(bounds.temperature, bounds.keys)


def draw_among_few(logits: Logits, b: Bounds) -> Tensor:
    """Of top-k that keeps at most CANDIDATES of a row: they are exchanged instead of the logits."""
    return ops.sample_topk(logits.best(CANDIDATES), b.temperature, b.top_k, b.top_p, b.min_p, b.keys)


def _nucleus(logits: Logits, b: Bounds) -> Tensor:
    """Of top-p and min-p among the whole vocabulary."""
    return ops.sample_top_p(logits.shard, b.temperature, b.top_p, b.min_p, b.keys)


def _sorted(logits: Logits, b: Bounds) -> Tensor:
    """Of top-k that keeps more than CANDIDATES."""
    ordered, ids = (logits.shard / b.temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    kept = ops.mask_top_k_top_p(ordered, b.top_k, b.top_p, b.min_p)
    return ops.merge_candidates(ops.gumbel_argmax(kept, torch.ones_like(b.temperature), b.keys, tokens=ids.int())[None])


def _way(p: SamplingParams) -> int:
    if p.temperature == 0 or (p.top_k <= 0 and p.top_p == 1 and p.min_p == 0):
        return RACE
    if p.top_k <= 0:
        return NUCLEUS
    return FEW if p.top_k <= CANDIDATES else SORTED


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 on uint64, as in `race`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
