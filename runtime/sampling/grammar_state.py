"""Grammar states of the constrained requests: each rank advances them by its sampled tokens, and masks logits.

The mask of a step needs the token of the step before, which is still on the device when the step is launched. The rank
waits for it after it has queued the step's layers, so that the device computes while the host computes the mask. A
state is a function of the grammar and the tokens produced. It is therefore the same on every rank, and can be made
anew from an Admission.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llguidance
import numpy as np
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from ..model.batch import to_device
from ..plan import Admission
from .grammar import GrammarError, Vocabulary, failure_reason


class GrammarState:
    """One request's matcher, or the error that ended it."""

    def __init__(self, vocabulary: Vocabulary, admission: Admission) -> None:
        params = admission.params.structured_outputs
        assert params is not None
        self.kind = params.kind
        self.stop_ids = np.array(admission.stop_ids)
        self.first_stop = admission.num_prompt_tokens + admission.params.min_tokens
        self.error: str | None = None
        try:
            self._matcher: llguidance.LLMatcher = vocabulary.matcher(params)
        except GrammarError as error:
            self.error = str(error)
        else:
            self.advance(admission.tokens[admission.num_prompt_tokens :].tolist())

    def advance(self, tokens: list[int]) -> None:
        """Advance by sampled tokens; tokens after the end of the grammar are dropped, their request has ended."""
        if self.error is None and not self._matcher.is_stopped() and not self._matcher.consume_tokens(tokens):
            self._fail()

    def fill(self, mask: np.ndarray, position: int) -> None:
        """Set one bit for each token that may come at `position`: mask [W] int32, in place.

        Stop ids are allowed where the grammar may end, and before min_tokens only if nothing else may come.
        """
        if self.error is not None:
            return
        fill_next_token_bitmask(self._matcher, mask[None])
        bits = mask.view(np.uint32)
        word, bit = self.stop_ids // 32, np.uint32(1) << (self.stop_ids % 32).astype(np.uint32)
        if self._matcher.is_accepting():
            np.bitwise_or.at(bits, word, bit)
        if position < self.first_stop:
            without_stop_ids = bits.copy()
            np.bitwise_and.at(without_stop_ids, word, ~bit)
            if without_stop_ids.any():
                bits[:] = without_stop_ids
        if self._matcher.is_error() or not bits.any():
            self._fail()

    def _fail(self) -> None:
        self.error = f"structured_outputs={self.kind} ended this output: {failure_reason(self._matcher)}"


@dataclass(frozen=True)
class PendingTokens:
    """The sampled tokens of the last step, which are still being copied to the host."""

    states: list[tuple[int, int, GrammarState]]  # slot, index among the tokens
    wait: Callable[[], np.ndarray]


class GrammarStates:
    """The grammar states of a rank's slots."""

    def __init__(self, vocabulary: Vocabulary, max_num_seqs: int) -> None:
        self.active = np.zeros(max_num_seqs, bool)  # slots with a grammar
        self._vocabulary = vocabulary
        self._states: list[GrammarState | None] = [None] * max_num_seqs
        self._pending: PendingTokens | None = None

    def admit(self, admission: Admission) -> None:
        """Start the grammar of a request that takes a slot, and advance it by the tokens already produced."""
        constrained = admission.params.structured_outputs is not None
        self._states[admission.slot] = GrammarState(self._vocabulary, admission) if constrained else None
        self.active[admission.slot] = constrained

    def advance(self) -> None:
        """Advance by the tokens of the last step; waits for them if a slot still needs them."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        live = [(i, state) for slot, i, state in pending.states if self._states[slot] is state]
        if live:
            tokens = pending.wait()
            for i, state in live:
                state.advance([int(tokens[i])])

    def advance_later(self, slots: np.ndarray, wait: Callable[[], np.ndarray]) -> None:
        """Leave the sampled tokens [S] of `slots` [S], which `wait` returns, to the next `advance`."""
        states = [(slot, i, self._states[slot]) for i, slot in enumerate(slots.tolist())]
        self._pending = PendingTokens([(slot, i, state) for slot, i, state in states if state is not None], wait)

    def mask(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> dict[int, str]:
        """Set excluded logits [S, V] to -inf, in place; return the reason by row where a grammar cannot continue."""
        failed: dict[int, str] = {}
        rows = np.flatnonzero(self.active[slots])
        masks = allocate_token_bitmask(len(rows), logits.shape[1])
        for mask, row in zip(masks, rows.tolist(), strict=True):
            state = self._states[slots[row]]
            assert state is not None
            state.fill(mask, int(positions[row]))
            if state.error is not None:
                failed[row] = state.error
                mask[:] = -1  # the token that is sampled now is dropped
        mask_tokens_(logits, to_device(rows, logits.device), to_device(masks, logits.device))
        return failed


def mask_tokens_(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set logits to -inf where a row's bit is 0: logits [S, V] float32 in place, rows [G] int64, masks [G, W] int32."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1  # [G, W, 32]
    allowed = bits.flatten(1)[:, : logits.shape[1]] != 0
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
