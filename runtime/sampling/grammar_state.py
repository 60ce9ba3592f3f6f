"""Grammar states of the constrained requests on rank 0, which advances them by the sampled tokens and masks logits.

The mask of a step needs the token of the step before, which is still on the device when the step is launched. The rank
waits for it after it has queued the step's layers, so that the device computes while the host computes the mask. A
state is a function of the grammar and the tokens produced, and can be made anew from an Admission.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import llguidance
import numpy as np
import torch
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from torch import Tensor

from ..model.batch import to_device
from ..plan import Admission
from ..structured_outputs import StructuredOutputsParams
from .grammar import CompiledGrammar, GrammarError, Vocabulary, failure_reason, load_tokenizer
from .grammar_budget import CHEAP_S, GrammarCost, MaskBudget

NO_SLOTS = np.empty(0, np.int32)
REPLAYED_TOKENS = 16  # tokens consumed between two looks at the budget


class GrammarState:
    """One request's matcher, or the error that ended it."""

    def __init__(self, compiled: CompiledGrammar, admission: Admission, budget: MaskBudget) -> None:
        params = admission.params.structured_outputs
        assert params is not None
        self.kind = params.kind
        self.stop_ids = np.array(admission.stop_ids)
        self.first_stop = admission.num_prompt_tokens + admission.params.min_tokens
        self.error: str | None = None
        self.compiled, self._budget = compiled, budget
        self._tokens: list[int] = []  # the tokens consumed so far
        self._matcher: llguidance.LLMatcher = compiled.matcher()
        self.advance(admission.tokens[admission.num_prompt_tokens :].tolist())

    def advance(self, tokens: Sequence[int]) -> None:
        """Advance by sampled tokens; tokens after the end of the grammar are dropped, their request has ended."""
        for start in range(0, len(tokens), REPLAYED_TOKENS):
            if self.error is not None or self._is_ended() or self._matcher.is_stopped():
                return
            chunk = list(tokens[start : start + REPLAYED_TOKENS])
            self._tokens += chunk
            began = time.thread_time()
            consumed = self._matcher.consume_tokens(chunk) or self._renew()
            self._budget.add_tokens(self.compiled.cost, time.thread_time() - began)
            self._budget.enforce([self.compiled.cost])
            if not consumed:
                self._fail(failure_reason(self._matcher))

    def fill(self, mask: np.ndarray, position: int) -> None:
        """Set one bit for each token that may come at `position`: mask [W] int32, in place.

        Stop ids are allowed where the grammar may end, and before min_tokens only if nothing else may come.
        """
        if self.error is not None or self._is_ended():
            return
        began = time.thread_time()
        fill_next_token_bitmask(self._matcher, mask[None])
        if self._matcher.is_error() and self._renew():
            fill_next_token_bitmask(self._matcher, mask[None])
        self._budget.add_mask(self.compiled.cost, time.thread_time() - began)
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
            self._fail(failure_reason(self._matcher))

    def _renew(self) -> bool:
        """Consume the tokens again with a lexer of this request alone, if the shared one has reached its limit."""
        if not self._matcher.get_error().startswith("lexer error: too many"):
            return False
        self.compiled.renew()
        self._matcher = self.compiled.matcher()
        return self._matcher.consume_tokens(self._tokens)

    def _is_ended(self) -> bool:
        """Return whether the grammar was ended for its slowness; its requests then end with an error."""
        if self.compiled.cost.is_banned:
            self._fail(self.compiled.cost.verdict)
        return self.error is not None

    def _fail(self, reason: str) -> None:
        self.error = f"structured_outputs={self.kind} ended this output: {reason}"


@dataclass(frozen=True)
class PendingTokens:
    """The sampled tokens of the last step, which are still being copied to the host."""

    states: list[tuple[int, int, GrammarState]]  # slot, index among the tokens
    wait: Callable[[], np.ndarray]


class GrammarStates:
    """The slots with a grammar, and on rank 0, which has the vocabulary, their states."""

    def __init__(self, vocabulary: Vocabulary | None, max_num_seqs: int) -> None:
        self.active = np.zeros(max_num_seqs, bool)  # slots with a grammar
        self._vocabulary = vocabulary
        self._states: list[GrammarState | None] = [None] * max_num_seqs
        self._refusals: dict[int, str] = {}  # by slot: why its grammar cannot be compiled
        self._pending: PendingTokens | None = None
        self._budget = MaskBudget()
        self._compiler = ThreadPoolExecutor(1, "lockstep-grammars")

    def preload(self) -> None:
        """Load the vocabulary before the first request: that holds the GIL, 1 s for 128k tokens."""
        if self._vocabulary is not None:
            with suppress(GrammarError):  # each request with a grammar gets the error
                load_tokenizer(self._vocabulary)

    def compile(self, params: StructuredOutputsParams) -> Future[object]:
        """Compile a grammar in another thread; errors are found again at the admission."""
        assert self._vocabulary is not None
        return self._compiler.submit(self._vocabulary.compile, params)

    def admit(self, admission: Admission) -> None:
        """Start the grammar of a request that takes a slot, and advance it by the tokens already produced."""
        slot, params = admission.slot, admission.params.structured_outputs
        self.active[slot] = params is not None
        self._states[slot] = None
        self._refusals.pop(slot, None)
        if self._vocabulary is None or params is None:
            return
        try:
            self._states[slot] = GrammarState(self._vocabulary.compile(params), admission, self._budget)
        except GrammarError as error:
            self._refusals[slot] = str(error)

    def advance(self) -> None:
        """Advance by the tokens of the last step; waits for them if a slot still needs them. Called in every step."""
        self._budget.begin_step()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        live = [(i, state) for slot, i, state in pending.states if self._states[slot] is state]
        if live:
            tokens = pending.wait()
            for i, state in live:
                state.advance([int(tokens[i])])

    def slots_to_leave_out(self, last_step: np.ndarray) -> np.ndarray:
        """Return slots [n] int32 with slow grammars, for whose masks the other requests of a step should not wait.

        last_step  [slots] int64: the last step of each slot; those that have waited longest are not left out
        """
        if not self.active.any():
            return NO_SLOTS
        slow = {slot: cost.mask_s for slot in np.flatnonzero(self.active).tolist() if (cost := self._slow_cost(slot))}
        if not slow:
            return NO_SLOTS
        in_turn = sorted(slow, key=lambda slot: int(last_step[slot]))
        return np.array(in_turn[self._budget.num_masks(max(slow.values())) :], np.int32)

    def _slow_cost(self, slot: int) -> GrammarCost | None:
        """Return the cost of a slot's grammar if its masks are slow."""
        state = self._states[slot]
        if state is None or state.error is not None or state.compiled.cost.mask_s <= CHEAP_S:
            return None
        return state.compiled.cost

    def advance_later(self, slots: np.ndarray, wait: Callable[[], np.ndarray]) -> None:
        """Leave the sampled tokens [S] of `slots` [S], which `wait` returns, to the next `advance`."""
        states = [(slot, i, self._states[slot]) for i, slot in enumerate(slots.tolist())]
        self._pending = PendingTokens([(slot, i, state) for slot, i, state in states if state is not None], wait)

    def mask(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, step_rows: int) -> dict[int, str]:
        """Set excluded logits [S, V] to -inf, in place; return the reason by row where a grammar cannot continue.

        The S rows are all with a grammar of a step that samples `step_rows`, and perhaps others. Other ranks than 0
        leave their logits as they are.
        """
        if self._vocabulary is None:
            return {}
        failed: dict[int, str] = {}
        rows = np.flatnonzero(self.active[slots])
        masks = allocate_token_bitmask(len(rows), logits.shape[1])
        states = [self._states[slot] for slot in slots[rows]]
        costs = {state.compiled.cost for state in states if state is not None}
        if len(rows) == step_rows and all(cost.mask_s > CHEAP_S for cost in costs):
            self._budget.forgive()
        for mask, row, state in zip(masks, rows.tolist(), states, strict=True):
            if state is not None:
                state.fill(mask, int(positions[row]))
                self._budget.enforce(costs)
            error = state.error if state is not None else self._refusals[int(slots[row])]
            if error is not None:
                failed[row] = error
                mask[:] = -1  # the token that is sampled now is dropped
        mask_tokens_(logits, to_device(rows, logits.device), to_device(masks, logits.device))
        return failed


def mask_tokens_(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set logits to -inf where a row's bit is 0: logits [S, V] float32 in place, rows [G] int64, masks [G, W] int32."""
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1  # [G, W, 32]
    allowed = bits.flatten(1)[:, : logits.shape[1]] != 0
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
