"""Which tokens each step computes: continuous batching with chunked prefill over pages, in integers only.

Every step takes the next token of all decoding requests and fills the rest of its token budget with prompts, oldest
first; prefill and decode share one batch. When pages run out, the newest request is preempted: its pages go to the
prefix tree or are freed, and it is computed again later. The oldest request never yields, so there is no deadlock and
no starvation.

State is advanced when a step is scheduled, not when it has run: `schedule` may be called again before the results of
the step before are known, and `commit` then only learns which tokens came. KV that a scheduled step will write may be
shared from that moment: every rank runs the steps in order, and within a step a row that is admitted reads its prefix
when the keys of all rows are stored.

Per-request state lives in NumPy arrays indexed by slot, so that a decode step costs the same few array operations for
one request as for hundreds; Python loops touch only requests that begin, end, or fill a page.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ..limits import Limits
from ..plan import Admission, Finished, FinishReason, StepOutput, StepPlan, TokenLogprobs
from ..request import Request
from .page_pool import PagePool
from .prefix_cache import NO_PAGES, Node

NO_SLOTS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Scheduled:
    """A plan on its way, with who its sampled rows belonged to when it was made."""

    plan: StepPlan
    slots: np.ndarray  # [S] int32
    tickets: np.ndarray  # [S] int64: one per admission, so that a slot's next owner is not taken for this one
    explained: dict[int, int]  # rows of the plan -> uid: requests that want to know of their prompts


class Scheduler:
    """Requests in, plans out; see the module docstring."""

    def __init__(self, limits: Limits) -> None:
        n, pages_per_seq = limits.max_num_seqs, -(-limits.max_length // limits.page_size)
        self.limits = limits
        self.pages = PagePool(limits.num_pages, limits.page_size)
        self.waiting: deque[Request] = deque()  # in order of arrival; preempted requests are at the front
        self.order = NO_SLOTS  # [R] the running slots, in order of arrival
        self.requests: list[Request | None] = [None] * n
        self.nodes: list[Node] = [self.pages.tree.root] * n  # locked end of the shared prefix, when caching
        self.tokens = np.zeros((n, limits.max_length), np.int32)
        self.page_table = np.zeros((n, pages_per_seq), np.int32)
        self.uid = np.zeros(n, np.int64)
        self.ticket = np.full(n, -1, np.int64)  # one per admission
        # Lengths in tokens. computed: KV scheduled; known: ids the host knows; length: known and on their way.
        self.computed, self.known, self.length, self.limit = (np.zeros(n, np.int32) for _ in range(4))
        self.min_length = np.zeros(n, np.int32)  # no stop id ends a request before
        self.num_pages = np.zeros(n, np.int32)  # in the page table, of these the first num_shared are the tree's
        self.num_shared = np.zeros(n, np.int32)
        self.stop_ids = np.full((n, 1), -1, np.int32)
        self.num_preemptions = 0
        self._free_slots = list(range(n - 1, -1, -1))
        self._step = 0
        self._next_ticket = 0
        self._writes: list[np.ndarray] = []  # [n, 3] each: the page table's changes since the last plan
        self._head_blocked = False  # the first waiting request did not fit, and nothing has been released since
        self._preempted: set[int] = set()  # uids that wait again
        self._explained: set[int] = set()  # slots whose requests want log-probabilities of their prompts
        self._cached: dict[int, int] = {}  # prefix hits to report with the next output

    # -- requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError where it can never run."""
        self.limits.check(request)
        self.waiting.append(request)

    def cancel(self, uid: int) -> Finished | None:
        """End a request wherever it is; None if it has ended already."""
        for i, request in enumerate(self.waiting):
            if request.uid == uid:
                del self.waiting[i]
                self._preempted.discard(uid)
                self._head_blocked = False
                return Finished(uid, "abort")
        for slot in self.order[self.uid[self.order] == uid].tolist():
            self._release(slot)
            return Finished(uid, "abort")
        return None

    @property
    def has_work(self) -> bool:
        return bool(self.waiting) or len(self.order) > 0

    # -- a step begins

    def schedule(self) -> Scheduled | None:
        """The next step, or None if nothing can be computed now (no requests, or all wait for results)."""
        counts = self._make_room()
        self._extend_decoding(self.order[counts == 1])
        if len(self.order) and counts[-1] > 1:
            self._extend_prefill(int(self.order[-1]), int(counts[-1]))
        admitted: list[Admission] = []
        if not self._head_blocked:
            admitted, new_counts = self._admit(self.limits.max_num_batched_tokens - int(counts.sum()))
            counts = np.append(counts, np.array(new_counts, np.int32))
        return self._seal(counts, admitted)

    def _choose_counts(self) -> np.ndarray:
        """Tokens to compute for each running slot: all that decode, and what the budget allows of the last one.

        Only the newest request can be in the middle of its prompt: it was cut for want of budget, and then none is
        left to admit the next. So whoever has the same prefix comes after it and finds it in the tree.
        """
        slots = self.order
        counts = np.where(self.length[slots] < self.limit[slots], self.length[slots] - self.computed[slots], 0)
        if len(slots):
            counts[-1] = min(counts[-1], self.limits.max_num_batched_tokens - counts[:-1].sum())
        return counts

    def _pages_for(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.limits.page_size)

    def _make_room(self) -> np.ndarray:
        """The counts of this step, after preempting the newest requests until there are pages for it."""
        while True:
            counts = self._choose_counts()
            needed = self._pages_for(self.computed[self.order] + counts) - self.num_pages[self.order]
            if int(np.maximum(needed, 0).sum()) <= self.pages.num_available:
                return counts
            self._preempt(int(self.order[-1]))

    def _extend_decoding(self, slots: np.ndarray) -> None:
        """A page for each decode row whose last one is full."""
        full = slots[self.computed[slots] >= self.num_pages[slots] * self.limits.page_size]
        if len(full):
            self._append_pages(full, self.pages.allocate(len(full)))

    def _extend_prefill(self, slot: int, count: int) -> None:
        """Pages for the next `count` tokens of a prompt."""
        end = int(self.computed[slot]) + count
        missing = -(-end // self.limits.page_size) - int(self.num_pages[slot])
        if missing > 0:
            self._append_pages(np.full(missing, slot, np.int32), self.pages.allocate(missing))
        self._share(slot, end)

    def _append_pages(self, slots: np.ndarray, pages: np.ndarray) -> None:
        """Add pages[i] to the page table of slots[i]; slots are distinct, or all the same."""
        first = self.num_pages[slots]
        index = first + np.arange(len(pages), dtype=np.int32) if len(slots) > 1 and slots[0] == slots[-1] else first
        self.page_table[slots, index] = pages
        self.num_pages[slots] = index + 1  # of equal slots the last one counts
        self._writes.append(np.stack((slots, index, pages), axis=1).astype(np.int32))

    # -- the prefix cache

    def _match(self, request: Request) -> tuple[Node, np.ndarray]:
        """The longest cached prefix of a request's tokens, as the tree's node and pages.

        The last token is always left to compute: its hidden state gives the next one. So are all where the prompt's
        log-probabilities are wanted: the cache has keys and values, but not what the model made of them.
        """
        if not self.limits.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return self.pages.tree.root, NO_PAGES
        size, tokens = self.limits.page_size, request.tokens
        return self.pages.tree.match(tokens[: (len(tokens) - 1) // size * size])

    def _share(self, slot: int, end: int) -> None:
        """Give the tree the whole pages before token `end`, which this step completes; the slot goes on using them.

        Where the tree has somebody else's copy by now, the slot keeps its own until it ends.
        """
        size, shared = self.limits.page_size, int(self.num_shared[slot])
        full = min(end, int(self.known[slot])) // size
        if not self.limits.enable_prefix_caching or full == shared:
            return
        tree, tokens = self.pages.tree, self.tokens[slot, shared * size : full * size]
        if len(tree.match(tokens, self.nodes[slot])[1]) == 0:
            node, _ = tree.insert(tokens, self.page_table[slot, shared:full], self.nodes[slot])
            tree.lock(node)
            tree.unlock(self.nodes[slot])
            self.nodes[slot] = node
            self.num_shared[slot] = full

    # -- admission

    def _admit(self, budget: int) -> tuple[list[Admission], list[int]]:
        """Let waiting requests in, in order, while slots, tokens and pages for their whole prompts are there."""
        admitted: list[Admission] = []
        counts: list[int] = []
        while self.waiting and self._free_slots and budget > 0:
            request = self.waiting[0]
            node, pages = self._match(request)
            self.pages.tree.lock(node)
            if not self._fits(len(request.tokens), len(pages)):
                self.pages.tree.unlock(node)
                self._head_blocked = True
                break
            self.waiting.popleft()
            slot = self._free_slots.pop()
            self._occupy(slot, request, node, pages)
            counts.append(min(len(request.tokens) - int(self.computed[slot]), budget))
            self._extend_prefill(slot, counts[-1])
            budget -= counts[-1]
            admitted.append(
                Admission(slot, request.tokens, request.num_prompt_tokens, request.params, request.stop_ids)
            )
        return admitted, counts

    def _fits(self, length: int, present: int) -> bool:
        """Room for a whole prompt of which `present` pages are there, and one page more for every running request."""
        needed = -(-length // self.limits.page_size) - present
        return needed + len(self.order) <= self.pages.num_available

    def _occupy(self, slot: int, request: Request, node: Node, pages: np.ndarray) -> None:
        """Give the slot to a request whose cached prefix ends at `node`, locked, and lies in `pages`."""
        n = len(request.tokens)
        self.order = np.append(self.order, np.int32(slot))
        self.uid[slot] = request.uid
        self.requests[slot] = request
        self.ticket[slot] = self._next_ticket
        self._next_ticket += 1
        self.tokens[slot, :n] = request.tokens
        self.known[slot] = self.length[slot] = n
        self.limit[slot] = min(request.max_length, self.limits.max_length)
        # A grammar that has nothing to add ends before min_tokens; until then its mask holds stop ids back.
        min_tokens = 0 if request.params.structured_outputs is not None else request.params.min_tokens
        self.min_length[slot] = request.num_prompt_tokens + min_tokens
        self._set_stop_ids(slot, request.stop_ids)
        if request.params.prompt_logprobs is not None:
            self._explained.add(slot)
        self.nodes[slot] = node
        self.num_pages[slot] = 0
        self._append_pages(np.full(len(pages), slot, np.int32), pages)
        self.num_shared[slot] = len(pages)
        self.computed[slot] = len(pages) * self.limits.page_size
        if request.uid not in self._preempted:
            self._cached[request.uid] = int(self.computed[slot])
        self._preempted.discard(request.uid)

    def _set_stop_ids(self, slot: int, ids: list[int]) -> None:
        if len(ids) > self.stop_ids.shape[1]:
            wider = np.full((len(self.stop_ids), len(ids)), -1, np.int32)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = ids

    # -- the plan

    def _seal(self, counts: np.ndarray, admitted: list[Admission]) -> Scheduled | None:
        """Advance the state of all rows by what they compute, and write the plan down."""
        rows, counts = self.order[counts > 0], counts[counts > 0].astype(np.int32)
        if len(rows) == 0:
            return None
        starts = self.computed[rows]
        self.computed[rows] += counts
        sampled = np.flatnonzero(self.computed[rows] == self.length[rows]).astype(np.int32)
        slots = rows[sampled]
        self.length[slots] += 1
        writes = np.concatenate(self._writes).ravel() if self._writes else NO_PAGES
        self._writes = []
        plan = StepPlan(self._step, admitted, rows, starts, counts, sampled, writes)
        self._step += 1
        explained: dict[int, int] = {}
        if self._explained:
            explained = {row: int(self.uid[slot]) for row, slot in enumerate(rows.tolist()) if slot in self._explained}
        return Scheduled(plan, slots, self.ticket[slots], explained)

    # -- a step has run

    def commit(
        self,
        scheduled: Scheduled,
        tokens: np.ndarray,
        logprobs: dict[int, TokenLogprobs] | None = None,
        failed: dict[int, str] | None = None,
    ) -> StepOutput:
        """Take in the sampled tokens [S] of a step, in the order of its sampled rows; ends the requests that are done.

        `logprobs` are by index into tokens; so is `failed`: who ends with an error instead of a token. Tokens of
        requests that were cancelled or preempted since are dropped: sampling is keyed by position, so a preempted
        request will draw the same token again.
        """
        finished = self._end_failed(scheduled, failed) if failed else []
        alive = np.flatnonzero(self.ticket[scheduled.slots] == scheduled.tickets)
        slots, tokens = scheduled.slots[alive], tokens[alive]
        self.tokens[slots, self.known[slots]] = tokens
        self.known[slots] += 1
        uids = self.uid[slots].tolist()
        stopped = (self.stop_ids[slots] == tokens[:, None]).any(axis=1) & (self.known[slots] > self.min_length[slots])
        ended = stopped | (self.known[slots] == self.limit[slots])
        for i in np.flatnonzero(ended).tolist():
            reason: FinishReason = "stop" if stopped[i] else "length"
            finished.append(Finished(uids[i], reason, int(tokens[i]) if stopped[i] else None))
            self._release(int(slots[i]))
        cached, self._cached = self._cached, {}
        kept = {uids[i]: logprobs[row] for i, row in enumerate(alive.tolist()) if row in logprobs} if logprobs else {}
        return StepOutput(uids, tokens.tolist(), finished, kept, cached, free_pages=self.pages.num_available)

    def _end_failed(self, scheduled: Scheduled, failed: dict[int, str]) -> list[Finished]:
        finished = []
        for i, reason in failed.items():
            slot = int(scheduled.slots[i])
            if self.ticket[slot] == scheduled.tickets[i]:
                finished.append(Finished(int(self.uid[slot]), "error", error=reason))
                self._release(slot)
        return finished

    def _preempt(self, slot: int) -> None:
        """Back to the front of the queue with the tokens it has; its cached pages may be there when it returns."""
        request = self.requests[slot]
        assert request is not None
        tokens = self.tokens[slot, : self.known[slot]].copy()
        self._release(slot)
        self.waiting.appendleft(
            Request(request.uid, tokens, request.num_prompt_tokens, request.params, request.stop_ids)
        )
        self._preempted.add(request.uid)
        self.num_preemptions += 1

    def _release(self, slot: int) -> None:
        """The slot is free; its whole pages go to the tree, the others and duplicates back to the pool."""
        size, shared = self.limits.page_size, int(self.num_shared[slot])
        pages = self.page_table[slot, : self.num_pages[slot]].copy()
        kept = shared
        if self.limits.enable_prefix_caching:
            full = int(min(self.computed[slot], self.known[slot])) // size
            tokens = self.tokens[slot, shared * size : full * size]
            _, present = self.pages.tree.insert(tokens, pages[shared:full], self.nodes[slot])
            self.pages.release(pages[shared : shared + present])
            kept = full
        self.pages.release(pages[kept:])
        self.pages.tree.unlock(self.nodes[slot])
        self.requests[slot] = None
        self._explained.discard(slot)
        self.ticket[slot] = -1
        self.order = self.order[self.order != slot]
        self._head_blocked = False
        self._free_slots.append(slot)
