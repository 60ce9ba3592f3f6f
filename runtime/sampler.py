"""From logits to tokens, the same on every rank: a function of the logits, the request and the position only.

A random draw is a race (`ops.race`): token v wins with the least E(v) / p(v), E(v) being exponential noise hashed from
the request's seed, the position and v. So neither the batch, nor the row, nor what was drawn before has any influence,
and a rank runs its part of the race over its part of the vocabulary. Top-k needs no more than each rank's best tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels import ops
from .model.logits import Logits
from .plan import Admission, TokenLogprobs
from .request import SamplingParams

RACE, FEW, NUCLEUS, SORTED = range(4)  # ways to draw; from NUCLEUS on the whole vocabulary is needed
CANDIDATES = 64  # of a row, where top-k keeps no more; one number, so that sums have the same bits in any batch
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: the increment of SplitMix64


@dataclass(frozen=True)
class SlotState:
    """What sampling needs to know of the request in a slot."""

    params: SamplingParams
    num_prompt_tokens: int
    stop_ids: Tensor  # [n] int64, on the device

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


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
        self.logprobs = np.full(max_num_seqs, -1, np.int32)
        self.prompt_logprobs = np.full(max_num_seqs, -1, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)

    def admit(self, admission: Admission) -> None:
        """Take over the parameters of a request that has been given a slot; params.seed must be set."""
        slot, p = admission.slot, admission.params
        assert p.seed is not None, "the front end draws a seed for each request"
        stop_ids = torch.tensor(admission.stop_ids, dtype=torch.int64, device=self.device)
        state = SlotState(p, admission.num_prompt_tokens, stop_ids)
        self.slots[slot] = state
        self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
        self.top_k[slot], self.seed[slot] = max(p.top_k, 0), p.seed % 2**64
        self.way[slot] = _way(p)
        guided = p.structured_outputs is not None  # its logits come masked
        self.edited[slot] = guided or state.has_penalties or bool(p.logit_bias) or p.min_tokens > 0
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
        for row in np.flatnonzero(self.edited[slots]).tolist():
            self._edit(logits.shard[row], int(slots[row]), int(positions[row]), tokens)
        temperature, keys = (self._to_device(array) for array in self.race_inputs(slots, positions))
        ways = self.way[slots]
        chosen = torch.empty(len(slots), dtype=torch.int32, device=self.device)
        for way, draw in enumerate((self._race, self._among_few, self._nucleus, self._sorted)):
            rows = np.flatnonzero(ways == way)
            if len(rows) == len(slots):
                return draw(logits, slots, temperature, keys)
            if len(rows):
                index = self._to_device(rows)
                chosen[index] = draw(logits[index], slots[rows], temperature[index], keys[index])
        return chosen

    def race_inputs(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Temperature [S] float32 and key [S] int64 of each row for `ops.race`, on the host."""
        keys = _mix(_mix(self.seed[slots]) + GOLDEN * positions.astype(np.uint64))
        return self.temperature[slots], keys.view(np.int64)

    def is_plain(self, slots: np.ndarray) -> bool:
        """Whether a race is all that these requests ask for."""
        return not self.needs_all(slots) and not (self.way[slots] == FEW).any()

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

    def _edit(self, logits: Tensor, slot: int, position: int, tokens: Tensor) -> None:
        """Penalties, logit bias and min_tokens on one row [V], in place."""
        state = self.slots[slot]
        assert state is not None
        if state.has_penalties:
            self._penalize(logits, state, tokens[slot, :position].long())
        for token, bias in state.params.logit_bias.items():
            logits[token] += bias
        may_stop = position >= state.num_prompt_tokens + state.params.min_tokens
        if not may_stop and state.params.structured_outputs is None:  # else runtime/guide.py has seen to it
            logits[state.stop_ids] = -torch.inf

    def _penalize(self, logits: Tensor, state: SlotState, tokens: Tensor) -> None:
        """Repetition counts prompt and output (Keskar et al., 2019); presence and frequency the output (OpenAI)."""
        p = state.params
        if p.repetition_penalty != 1:
            seen = tokens.unique()
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        counts = torch.bincount(tokens[state.num_prompt_tokens :], minlength=len(logits))
        logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)

    def _race(self, logits: Logits, slots: np.ndarray, temperature: Tensor, keys: Tensor) -> Tensor:
        return logits.race(temperature, keys)

    def _among_few(self, logits: Logits, slots: np.ndarray, temperature: Tensor, keys: Tensor) -> Tensor:
        """Of top-k that keeps at most CANDIDATES of a row: they are exchanged instead of the logits."""
        return ops.draw(logits.best(CANDIDATES), temperature, *self._bounds(slots), keys)

    def _nucleus(self, logits: Logits, slots: np.ndarray, temperature: Tensor, keys: Tensor) -> Tensor:
        """Of top-p and min-p among the whole vocabulary."""
        _, top_p, min_p = self._bounds(slots)
        return ops.nucleus(logits.shard, temperature, top_p, min_p, keys)

    def _sorted(self, logits: Logits, slots: np.ndarray, temperature: Tensor, keys: Tensor) -> Tensor:
        """Of top-k that keeps more than CANDIDATES."""
        ordered, ids = (logits.shard / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
        kept = ops.cut(ordered, *self._bounds(slots))
        return ops.winners(ops.race(kept, torch.ones_like(temperature), keys, tokens=ids.int())[None])

    def _bounds(self, slots: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """top_k, top_p and min_p of these slots, on the device."""
        top_k, top_p, min_p = (self._to_device(bound[slots]) for bound in (self.top_k, self.top_p, self.min_p))
        return top_k, top_p, min_p

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


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
