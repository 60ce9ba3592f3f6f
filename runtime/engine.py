"""The leader's loop body: schedule a step, publish its plan, launch it, commit the results of a finished one.

With overlap, a step is scheduled and launched while the one before still runs. It reads its inputs on the device, from
the slot tables where the sampler writes its tokens. The host gets the tokens one step later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from .plan import RequestEnd, StepOutput, StepPlan
from .request import Request
from .runner.profiler import Profiler
from .runner.runner import PendingStep, Runner
from .scheduler.scheduled_step import ScheduledStep
from .scheduler.scheduler import Scheduler
from .stats import EngineStats, Profile

COMPILATION_S = 0.01  # longest wait for a grammar between two looks for commands


@dataclass(frozen=True)
class InFlightStep:
    """A step that has been launched and not committed."""

    scheduled: ScheduledStep
    pending: PendingStep
    started: float  # by time.perf_counter, in seconds


@dataclass(frozen=True)
class CompilingRequest:
    """A request whose grammar is being compiled; other requests are scheduled meanwhile."""

    request: Request
    grammar: Future[object]


class Engine:
    """One group of ranks, run from rank 0; `publish` sends each plan to the followers before it runs here."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, publish: Callable[[StepPlan], None], *, overlap: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._publish = publish
        self._overlap = overlap
        self.stats = EngineStats()
        self._before_s = runner.memory.attention.host_s, runner.comm.host_s
        self._running: InFlightStep | None = None
        self._last_end = 0.0  # end of the last step, by time.perf_counter
        self._compiling: dict[int, CompilingRequest] = {}  # by uid
        self._finished: list[RequestEnd] = []  # requests refused or cancelled since the last step
        self._admitted_at: dict[int, float] = {}  # uid -> time.perf_counter, of requests without a token
        self._profiler: Profiler | None = None
        self._profile: Profile | None = None

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests; one that can never run ends with the next step, with reason "abort" and the rule."""
        for request in requests:
            structured = request.params.structured_outputs
            if structured is None:
                self._queue(request)
            else:
                grammar = self.runner.memory.grammars.compile(structured)
                self._compiling[request.uid] = CompilingRequest(request, grammar)

    def cancel(self, uids: Sequence[int]) -> None:
        """End these requests with reason "abort", unless they have ended."""
        for uid in uids:
            if self._compiling.pop(uid, None) is not None:
                self._finished.append(RequestEnd(uid, "abort"))
            elif (finished := self.scheduler.cancel(uid)) is not None:
                self._admitted_at.pop(uid, None)
                self._finished.append(finished)

    @property
    def has_work(self) -> bool:
        is_busy = self.scheduler.has_work or self._running is not None or self._profiler is not None
        return is_busy or bool(self._finished) or bool(self._compiling)

    def step(self) -> StepOutput:
        """Launch a step, if there is anything to compute, and return the output of a finished one."""
        if self._compiling:
            self._queue_compiled()
        before, self._running = self._running, self._launch()
        if not self._overlap:
            before, self._running = self._running, None
        output = self._commit(before) if before is not None else StepOutput()
        output.finished.extend(self._finished)
        self._finished.clear()
        return output

    def start_profile(self, num_steps: int) -> None:
        """Trace up to `num_steps` decode steps, from the next one on, for `take_profile`."""
        self._profiler = Profiler(self.runner.memory, num_steps)

    def take_profile(self) -> Profile | None:
        """Return a complete profile, once."""
        profile, self._profile = self._profile, None
        return profile

    def _queue(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except ValueError as error:
            self._finished.append(RequestEnd(request.uid, "abort", error=str(error)))

    def _queue_compiled(self) -> None:
        """Queue the requests whose grammar has been compiled; wait for one a moment if there is nothing else to do."""
        if not self.scheduler.has_work and self._running is None:
            wait((entry.grammar for entry in self._compiling.values()), COMPILATION_S, FIRST_COMPLETED)
        for uid, entry in list(self._compiling.items()):
            if entry.grammar.done():
                del self._compiling[uid]
                self._queue(entry.request)

    def _launch(self) -> InFlightStep | None:
        started = time.perf_counter()
        grammars, scheduler = self.runner.memory.grammars, self.scheduler
        scheduler.division.left_out = grammars.slots_to_leave_out(scheduler.slots.last_step)
        scheduled = scheduler.schedule()
        if self._profiler is not None:
            self._profile = self._profiler.before_launch(scheduled.plan if scheduled is not None else None)
            self._profiler = self._profiler if self._profile is None else None
            started = time.perf_counter()  # starting and ending a trace takes seconds, which are not the step's
        if scheduled is None:
            return None
        for admission in scheduled.plan.admitted:
            self._admitted_at.setdefault(int(self.scheduler.slots.uid[admission.slot]), started)
        self._publish(scheduled.plan)
        published = time.perf_counter()
        pending = self.runner.launch(scheduled.plan)
        self.stats.schedule_s += published - started
        self.stats.launch_s += time.perf_counter() - published
        self.stats.attention_s = self.runner.memory.attention.host_s - self._before_s[0]
        self.stats.collective_s = self.runner.comm.host_s - self._before_s[1]
        return InFlightStep(scheduled, pending, started)

    def _commit(self, step: InFlightStep) -> StepOutput:
        waiting = time.perf_counter()
        sampled = step.pending.wait()
        arrived = time.perf_counter()
        output = self.scheduler.commit(step.scheduled, sampled.tokens, logprobs=sampled.logprobs, failed=sampled.failed)
        for row, logprobs in sampled.prompt_logprobs.items():
            output.prompt_logprobs[step.scheduled.prompt_logprobs[row]] = logprobs
        ended = time.perf_counter()
        if self._admitted_at:
            self._note_prefills(output, ended)
        self.stats.wait_s += arrived - waiting
        self.stats.commit_s += ended - arrived
        seconds = ended - max(step.started, self._last_end)
        self._count(step.scheduled.plan, len(output.tokens), seconds)
        latency, is_limited = ended - step.started, step.scheduled.is_limited
        self.scheduler.division.budget.note(output.num_computed, latency, seconds, is_limited=is_limited)
        self._last_end = ended
        return output

    def _note_prefills(self, output: StepOutput, now: float) -> None:
        """Add the times from admission to first token to a step's output; requests that end without one have none."""
        for uid in self._admitted_at.keys() & output.uids:
            output.prefill_s[uid] = now - self._admitted_at.pop(uid)
        for end in output.finished:
            self._admitted_at.pop(end.uid, None)

    def _count(self, plan: StepPlan, num_tokens: int, seconds: float) -> None:
        """Add a step that has ended; on the path of every step, so as few NumPy calls as possible."""
        stats = self.stats
        stats.steps += 1
        stats.output_tokens += num_tokens
        stats.preemptions = self.scheduler.num_preemptions
        if plan.is_decode_only:
            stats.decode_steps += 1
            stats.decode_s += seconds
            stats.decode_kv_tokens += int(plan.starts.sum()) + len(plan.starts)
        else:
            stats.prompt_tokens += int(plan.counts.sum()) - plan.num_decoding
