"""Continuous batching with chunked prefill: choose the tokens that each step computes.

A step computes the next token of all decoding requests and fills the rest of its token budget with prompts, oldest
first. Prefill and decode share one batch. When pages run out, the newest request is preempted: its pages go to the
prefix cache or are freed, and it is computed again later. The oldest request is never preempted, so there is neither
deadlock nor starvation. With priorities, the newest of the lowest priority is preempted, and may starve.

While several clients have requests, steps are shorter and divided among the clients (`StepDivision`); decoding requests
of a client with many then take turns. A client that waits gets slots and pages of clients with more than twice as many.

State advances when a step is scheduled, not when it has run. `schedule` may therefore be called again before the
results of the step before are known; `commit` then only adds the sampled tokens. KV that a scheduled step will write
may be shared at once: every rank runs the steps in order, and within a step an admitted row reads its prefix after all
rows have stored their keys.
"""

from __future__ import annotations

import msgspec
import numpy as np

from ..limits import Limits
from ..plan import Admission, FinishReason, RequestEnd, StepOutput, StepPlan, TokenLogprobs
from ..request import Request
from .fair_preemption import preempt_for_waiting_clients
from .prefix_cache import Node, PagePool
from .saved_states import SavedStates
from .scheduled_step import RunningRows, ScheduledStep
from .slot_pages import SlotPages
from .slots import PromptChunk, Slots
from .step_division import StepDivision, StepTokens, largest_holder
from .waiting_queue import WaitingQueue
from .window_pages import BlockPool


class Scheduler:
    """Requests in, plans out."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._states = SavedStates(limits)
        on_cut = self._states.give_up if limits.has_states else None
        self.pages = (
            BlockPool(limits) if limits.num_window_groups else PagePool(limits.num_pages, limits.page_size, on_cut)
        )
        self.slots = Slots(limits, self.pages.tree.root)
        self._slot_pages = SlotPages(limits, self.slots, self.pages)
        self.waiting = WaitingQueue(by_priority=limits.has_priorities)
        self.division = StepDivision(limits, self.slots, self.waiting)
        self.num_preemptions = 0
        self._num_steps = 0
        self._preempted: set[int] = set()  # uids that wait again
        self._prompt_logprobs: set[int] = set()  # slots of requests with SamplingParams.prompt_logprobs
        self._cached_tokens: dict[int, int] = {}  # prefix hits to report with the next output

    def add(self, request: Request) -> None:
        """Queue a request; raises ValueError if it can never run."""
        self.limits.check(request)
        self.waiting.add(request)

    def cancel(self, uid: int) -> RequestEnd | None:
        """End a waiting or running request; return None if it has ended already."""
        if self.waiting.remove(uid) is not None:
            self._preempted.discard(uid)
            return RequestEnd(uid, "abort")
        running = self.slots.running
        for slot in running[self.slots.uid[running] == uid].tolist():
            self._release(slot)
            return RequestEnd(uid, "abort")
        return None

    @property
    def has_work(self) -> bool:
        return len(self.waiting) > 0 or len(self.slots.running) > 0

    def schedule(self) -> ScheduledStep | None:
        """Return the next step, or None if there are no requests or all of them wait for results."""
        preempted = set[int]()
        if self.division.is_shared:
            preempted = preempt_for_waiting_clients(self.limits, self.slots, self.waiting, self._preempt, self._fits)
        if self._slot_pages.drop_unseen() or self.limits.window is not None:
            self.waiting.unblock()  # running requests free pages, too
        can_admit = bool(self.slots.free) and self.waiting.head() is not None
        scheduled = self._schedule(preempted, can_admit=can_admit)
        if scheduled is None and can_admit:  # tokens were kept for requests that did not fit
            scheduled = self._schedule(preempted, can_admit=False)
        return scheduled

    def _schedule(self, preempted: set[int], *, can_admit: bool) -> ScheduledStep | None:
        rows = self._make_room(can_admit=can_admit)
        self._slot_pages.extend_each(rows.full)
        for chunk in rows.chunks:
            self._extend_prompt(chunk)
        chunks = rows.chunks
        admitted = self._admit(rows.tokens, chunks, preempted) if can_admit else []
        return self._build_plan(rows.decoding, chunks, admitted, is_limited=rows.tokens.is_limited)

    def commit(
        self,
        scheduled: ScheduledStep,
        tokens: np.ndarray,
        logprobs: dict[int, TokenLogprobs] | None = None,
        failed: dict[int, str] | None = None,
    ) -> StepOutput:
        """Add the sampled tokens [S] of a step, and end the requests that are complete.

        tokens    [S] int32, in the order of the plan's sampled rows
        logprobs  by index into `tokens`
        failed    by index into `tokens`: the reason why a request ends with an error instead of a token
        Tokens of requests that were cancelled or preempted since are dropped. Sampling is keyed by position, so a
        preempted request samples the same token again.
        """
        finished = self._end_failed(scheduled, failed) if failed else []
        s, plan = self.slots, scheduled.plan
        live = np.flatnonzero(s.admission_id[scheduled.slots] == scheduled.admission_ids)
        slots, tokens = scheduled.slots[live], tokens[live]
        s.tokens[slots, s.num_known[slots]] = tokens
        s.num_known[slots] += 1
        lengths, uids = s.num_known[slots], s.uid[slots].tolist()
        stopped = (s.stop_ids[slots] == tokens[:, None]).any(axis=1) & (lengths > s.min_length[slots])
        for i in np.flatnonzero(stopped | (lengths == s.max_length[slots])).tolist():
            reason: FinishReason = "stop" if stopped[i] else "length"
            finished.append(RequestEnd(uids[i], reason, int(tokens[i]) if stopped[i] else None))
            self._release(int(slots[i]))
        cached_tokens, self._cached_tokens = self._cached_tokens, {}
        if logprobs:
            logprobs = {uids[i]: logprobs[row] for i, row in enumerate(live.tolist()) if row in logprobs}
        return StepOutput(
            uids=uids,
            tokens=tokens.tolist(),
            finished=finished,
            logprobs=logprobs or {},
            cached_tokens=cached_tokens,
            free_pages=self._slot_pages.num_free(),
            num_computed=len(plan.slots) if plan.is_decode_only else int(plan.counts.sum()),
        )

    def _make_room(self, *, can_admit: bool) -> RunningRows:
        """Preempt the newest requests until the rows of the others have their pages; return those rows.

        Of several clients, the one with most pages loses requests, until each has one.
        """
        while True:
            rows = self._running_rows(can_admit=can_admit)
            if self._slot_pages.find(rows.num_missing_pages):
                return rows
            several = self.slots.pages_by_client() if len(self.slots.num_by_client) > 1 else {}
            client = largest_holder(several)[1]
            self._preempt(self.slots.newest_of(client) if several else self._last_in_order())

    def _last_in_order(self) -> int:
        """Return the slot of the newest running request, of those with the lowest priority."""
        running: list[int] = self.slots.running.tolist()
        if not self.limits.has_priorities:
            return running[-1]
        return max(enumerate(running), key=lambda item: (self._priority_in(item[1]), item[0]))[1]

    def _priority_in(self, slot: int) -> int:
        request = self.slots.requests[slot]
        return 0 if request is None else request.priority

    def _running_rows(self, *, can_admit: bool) -> RunningRows:
        s, running = self.slots, self.slots.running
        lengths = s.length[running]
        pending = np.where(lengths < s.max_length[running], lengths - s.num_computed[running], 0)
        decoding, in_progress = running[pending == 1], np.flatnonzero(pending > 1)
        prompts = [PromptChunk(int(running[i]), int(pending[i])) for i in in_progress.tolist()]
        decoding, tokens = self.division.divide(decoding, prompts, self._num_steps, can_admit=can_admit)
        full = decoding[s.num_computed[decoding] >= s.num_pages[decoding] * self.limits.page_size]
        chunks = [
            chunk._replace(num_tokens=tokens.take(int(s.client[chunk.slot]), chunk.num_tokens)) for chunk in prompts
        ]
        chunks = [chunk for chunk in chunks if chunk.num_tokens]
        num_missing = len(full) + sum(self._slot_pages.num_missing(c.slot, self._end_of(c)) for c in chunks)
        return RunningRows(decoding, full, chunks, tokens, num_missing * self.limits.num_tables)

    def _end_of(self, chunk: PromptChunk) -> int:
        return int(self.slots.num_computed[chunk.slot]) + chunk.num_tokens

    def _extend_prompt(self, chunk: PromptChunk) -> None:
        """Allocate the pages of a chunk, and share the pages that it completes."""
        self._slot_pages.extend(chunk.slot, self._end_of(chunk))
        start, tokens = int(self.slots.num_computed[chunk.slot]), self.slots.tokens[chunk.slot]
        prefix = self.slots.prefix_nodes[chunk.slot]
        self._states.plan(chunk.slot, tokens, start, chunk.num_tokens, self.pages.tree, prefix, self._num_steps)

    def _preempt(self, slot: int) -> None:
        """Move a running request, with the tokens it has, back to the queue."""
        request = self.slots.requests[slot]
        assert request is not None
        tokens = self.slots.tokens[slot, : self.slots.num_known[slot]].copy()
        self._release(slot)
        self.waiting.add(msgspec.structs.replace(request, tokens=tokens), is_new=False)
        self._preempted.add(request.uid)
        self.num_preemptions += 1

    def _admit(self, tokens: StepTokens, chunks: list[PromptChunk], skip: set[int]) -> list[Admission]:
        """Admit waiting requests of clients not in `skip` while slots, tokens and pages last.

        Appends their first chunks to `chunks`, and adds clients without tokens to `skip`.
        """
        admitted: list[Admission] = []
        while self.slots.free and tokens.left > 0 and (request := self.waiting.head(skip)) is not None:
            if tokens.left_for(request.client) == 0:
                skip.add(request.client)
                continue
            prefix = self._slot_pages.lock_prefix(request)
            if prefix is None:
                if self.division.is_shared and largest_holder(self.slots.pages_by_client())[1] == request.client:
                    self.waiting.pass_over(request.client)
                    continue
                self.waiting.block(request)
                break
            self.waiting.pop(request.client)
            node, pages = prefix
            num_computed, state = self._states.start_of(node, len(pages), self._num_steps)
            slot = self._occupy(request, node, pages, num_computed)
            num_left = len(request.tokens) - int(self.slots.num_computed[slot])
            chunk = PromptChunk(slot, tokens.take(request.client, num_left))
            self._extend_prompt(chunk)
            chunks.append(chunk)
            admitted.append(
                Admission(
                    slot, request.tokens, request.num_prompt_tokens, request.params, request.stop_ids,
                    bad_words=request.bad_words, state=state, num_cached=len(pages) * self.limits.page_size,
                )
            )  # fmt: skip
        return admitted

    def _fits(self, request: Request) -> bool:
        prefix = self._slot_pages.lock_prefix(request)
        if prefix is not None:
            self.pages.tree.unlock(prefix[0])
        return prefix is not None

    def _occupy(self, request: Request, node: Node, pages: np.ndarray, num_computed: int) -> int:
        """Return a slot for a request; its cached prefix ends at `node`, locked, and lies in `pages`."""
        max_length = min(request.max_length, self.limits.max_length)
        slot = self.slots.acquire(request, node, num_computed, max_length)
        self._slot_pages.begin(slot, pages)
        self._states.admit(slot, len(request.tokens), len(pages) * self.limits.page_size, num_computed)
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs.add(slot)
        if request.uid not in self._preempted:
            self._cached_tokens[request.uid] = num_computed
        self._preempted.discard(request.uid)
        return slot

    def _build_plan(
        self, decoding: np.ndarray, chunks: list[PromptChunk], admitted: list[Admission], *, is_limited: bool
    ) -> ScheduledStep | None:
        """Advance the state of all rows by the tokens they compute, and make the plan."""
        s = self.slots
        rows, counts = decoding, np.ones(len(decoding), np.int32)
        if chunks:
            slots, lengths = np.array(chunks, np.int32).T
            rows, counts = np.append(rows, slots), np.append(counts, lengths)
        if len(rows) == 0:
            return None
        starts = s.num_computed[rows]
        s.num_computed[rows] += counts
        s.last_step[rows] = self._num_steps
        sampled = np.flatnonzero(s.num_computed[rows] == s.length[rows]).astype(np.int32)
        slots = rows[sampled]
        s.length[slots] += 1
        plan = StepPlan(
            step=self._num_steps,
            admitted=admitted,
            slots=rows,
            starts=starts,
            counts=counts,
            num_decoding=len(decoding),
            sampled_rows=sampled,
            page_writes=s.take_page_writes(),
            state_saves=self._states.take(rows),
        )
        self._num_steps += 1
        uids: dict[int, int] = {}
        if self._prompt_logprobs:
            uids = {row: int(s.uid[slot]) for row, slot in enumerate(rows.tolist()) if slot in self._prompt_logprobs}
        return ScheduledStep(
            plan=plan, slots=slots, admission_ids=s.admission_id[slots], prompt_logprobs=uids, is_limited=is_limited
        )

    def _end_failed(self, scheduled: ScheduledStep, failed: dict[int, str]) -> list[RequestEnd]:
        finished = []
        for i, reason in failed.items():
            slot = int(scheduled.slots[i])
            if self.slots.admission_id[slot] == scheduled.admission_ids[i]:
                finished.append(RequestEnd(int(self.slots.uid[slot]), "error", error=reason))
                self._release(slot)
        return finished

    def _release(self, slot: int) -> None:
        """Free a slot and its pages, of which whole ones go to the prefix cache."""
        self._slot_pages.release(slot)
        self._prompt_logprobs.discard(slot)
        self._states.release(slot)
        self.waiting.unblock()
        self.slots.release(slot)
