"""Constrained rows of a step: each rank moves a matcher along the tokens that it has sampled itself, and masks logits.

The mask of a step needs the token of the step before, which is on the device when the step is launched: it is waited
for after the step's layers have been queued, so that the device computes while the host works out the mask. A matcher
is a function of the grammar and the tokens produced, so it is the same on every rank, and made anew from an Admission.
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
from .grammar import GrammarError, Vocabulary, why_not


class GrammarState:
    """One request's matcher, or why it has none any more."""

    def __init__(self, vocabulary: Vocabulary, admission: Admission) -> None:
        structured = admission.params.structured_outputs
        assert structured is not None
        self.kind = structured.kind
        self.stop_ids = np.array(admission.stop_ids)
        self.first_stop = admission.num_prompt_tokens + admission.params.min_tokens
        self.error: str | None = None
        try:
            self._matcher: llguidance.LLMatcher = vocabulary.matcher(structured)
        except GrammarError as error:
            self.error = str(error)
        else:
            self.push(admission.tokens[admission.num_prompt_tokens :].tolist())

    def push(self, tokens: list[int]) -> None:
        """Move on; what comes after the end belongs to a request that has ended, and is dropped."""
        if self.error is None and not self._matcher.is_stopped() and not self._matcher.consume_tokens(tokens):
            self._fail()

    def fill(self, mask: np.ndarray, position: int) -> None:
        """One bit for each token that may come at `position`: mask [W] int32.

        Stop ids are allowed where the grammar may end, and before min_tokens only where nothing else is left.
        """
        if self.error is not None:
            return
        fill_next_token_bitmask(self._matcher, mask[None])
        bits = mask.view(np.uint32)
        word, bit = self.stop_ids // 32, np.uint32(1) << (self.stop_ids % 32).astype(np.uint32)
        if self._matcher.is_accepting():
            np.bitwise_or.at(bits, word, bit)
        if position < self.first_stop:
            longer = bits.copy()
            np.bitwise_and.at(longer, word, ~bit)
            if longer.any():
                bits[:] = longer
        if self._matcher.is_error() or not bits.any():
            self._fail()

    def _fail(self) -> None:
        self.error = f"structured_outputs={self.kind} ended this output: {why_not(self._matcher)}"


@dataclass(frozen=True)
class PendingTokens:
    """Tokens of the last step on their way to the host, and whose they are."""

    guides: list[tuple[int, int, GrammarState]]  # slot, index among the tokens
    fetch: Callable[[], np.ndarray]


class GrammarStates:
    """The guides of a rank's slots."""

    def __init__(self, vocabulary: Vocabulary, max_num_seqs: int) -> None:
        self.active = np.zeros(max_num_seqs, bool)  # the slots with a guide
        self._vocabulary = vocabulary
        self._guides: list[GrammarState | None] = [None] * max_num_seqs
        self._sent: PendingTokens | None = None

    def admit(self, admission: Admission) -> None:
        """Take over a request that has been given a slot, with what it has produced."""
        wanted = admission.params.structured_outputs is not None
        self._guides[admission.slot] = GrammarState(self._vocabulary, admission) if wanted else None
        self.active[admission.slot] = wanted

    def catch_up(self) -> None:
        """Take in the tokens of the last step; waits for them if any slot still needs them."""
        sent, self._sent = self._sent, None
        needed = [(i, guide) for slot, i, guide in sent.guides if self._guides[slot] is guide] if sent else []
        if sent is not None and needed:
            tokens = sent.fetch()
            for i, guide in needed:
                guide.push([int(tokens[i])])

    def mask(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> dict[int, str]:
        """Set what may not come to -inf in logits [S, V]; the rows of `slots` [S] that cannot go on, and why."""
        failed: dict[int, str] = {}
        rows = np.flatnonzero(self.active[slots])
        masks = allocate_token_bitmask(len(rows), logits.shape[1])
        for mask, row in zip(masks, rows.tolist(), strict=True):
            guide = self._guides[slots[row]]
            assert guide is not None
            guide.fill(mask, int(positions[row]))
            if guide.error is not None:
                failed[row] = guide.error
                mask[:] = -1  # whatever is sampled now is dropped
        forbid_(logits, to_device(rows, logits.device), to_device(masks, logits.device))
        return failed

    def sent(self, slots: np.ndarray, fetch: Callable[[], np.ndarray]) -> None:
        """These slots' next tokens [S] will be what `fetch` returns."""
        found = [(slot, i, self._guides[slot]) for i, slot in enumerate(slots.tolist())]
        self._sent = PendingTokens([(slot, i, guide) for slot, i, guide in found if guide is not None], fetch)


def forbid_(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """-inf where a row's bit is 0: logits [S, V] float32, rows [G] int64, masks [G, V / 32] int32, in place."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1  # [G, W, 32]
    allowed = bits.flatten(1)[:, : logits.shape[1]] != 0
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
