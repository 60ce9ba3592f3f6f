"""The engine thread's work: serve the live requests over one executor after another, as their ranks fail.

When the executor fails, it is closed, another one is started, and the front end's ledger is submitted again: the tasks
that wait for events see a pause and nothing else.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from ...comm.message_text import counted
from ...runtime.executor import Executor, Wakeup
from ...runtime.frontend import Frontend
from ...runtime.generation import Generation
from ...runtime.plan import StepOutput
from ...runtime.request import Request
from ...runtime.stats import EngineStats
from ..errors import EngineFailed, PlacementError, RankFailed, RayLost, RequestCrashedEngine, RequestsLost
from .engine_state import EngineEvent, Health
from .event_streams import EventSink, OutputQueues, send
from .quarantine import CrashQuarantine

log = logging.getLogger(__name__)
MOST_EVENTS = 100  # this many are kept
CLOSING = "the server is shutting down"  # clients see this reason


class NullExecutor:
    """A stand-in for an executor that has failed: requests stay in the ledger, and no results come."""

    def __init__(self, failed: Executor) -> None:
        self.limits, self.locations = failed.limits, failed.locations
        self.startup: dict[str, float] = {}
        self.stats = EngineStats()

    def submit(self, requests: Sequence[Request]) -> None: ...
    def cancel(self, uids: Sequence[int]) -> None: ...
    def start_profile(self, num_steps: int) -> None: ...
    def take_profile(self) -> None: ...
    def close(self) -> None: ...

    def poll(self, timeout_s: float) -> list[StepOutput]:
        return []

    def wait(self, wakeup: Wakeup) -> None:
        wakeup.wait()


class RecoveringEngine:
    """The driver of AsyncEngine's thread; other threads only read `health`, `stats`, `frontend` and `quarantine`.

    `resources` are closed after the last executor.
    """

    def __init__(
        self,
        frontend: Frontend,
        start_executor: Callable[[], Executor],
        resources: ExitStack,
        max_restarts: int,
        restart_window: float,
    ) -> None:
        self.frontend = frontend
        self.queues = OutputQueues()
        self.quarantine = CrashQuarantine(restart_window)
        self.health = Health("ready")
        self.events: deque[EngineEvent] = deque(maxlen=MOST_EVENTS)
        self._start_executor, self._resources = start_executor, resources
        self._max_restarts, self._restart_window = max_restarts, restart_window
        self._failures: list[float] = []  # times of time.monotonic, within the window
        self._previous_stats = EngineStats()  # sum over the executors that have failed

    @property
    def stats(self) -> EngineStats:
        """The counters of all executors since the start."""
        return self._previous_stats + self.frontend.executor.stats

    @property
    def busy(self) -> bool:
        return len(self.queues) > 0

    def submit(self, generation: Generation, sink: EventSink) -> None:
        """Submit a generation, whose events `sink` receives."""
        if self.health.state == "failed":
            send([(sink, EngineFailed(self.health.reason))])
        else:
            self.queues.add(generation, sink)
            self.frontend.submit([generation], paused=self.quarantine.hold(generation))

    def cancel(self, generation: Generation) -> None:
        self.queues.remove(generation)
        self.frontend.cancel([generation])

    def poll(self, timeout_s: float) -> None:
        if self.health.state == "recovering":
            self._restart()
        self._test_next_suspect()
        self.queues.deliver(self.frontend.poll(timeout_s))

    def wait(self, wakeup: Wakeup) -> None:
        self.frontend.executor.wait(wakeup)

    def on_failure(self, error: Exception) -> bool:
        if isinstance(error, RequestsLost):
            self._reroute(error)
        elif isinstance(error, RankFailed):
            log.error("%s%s", error, f"\nlast lines of its stderr:\n{error.stderr_tail}" if error.stderr_tail else "")
            self._on_ranks_failed(str(error), may_be_request=not isinstance(error, RayLost))
        else:  # a rank in this process: its step raises anything
            log.error("the engine failed", exc_info=error)
            self._on_ranks_failed(f"{type(error).__name__}: {error}", may_be_request=True)
        return True

    def detach(self) -> None:
        self._detached = self._replace_executor()

    def close(self) -> None:
        live = self.frontend.live
        self.frontend.cancel(self.queues.generations, CLOSING)
        self.queues.deliver(live)
        _close(self._detached)
        self._resources.close()

    def _on_ranks_failed(self, reason: str, *, may_be_request: bool) -> None:
        """Have the ranks started again by the next `poll`, unless that has happened too often.

        With `may_be_request` a live request may have caused the failure, and is blamed if it does so repeatedly.
        """
        executor, now = self._replace_executor(), time.monotonic()
        recent = [then for then in self._failures if now - then < self._restart_window]
        if may_be_request and not isinstance(executor, NullExecutor):  # the ranks had requests
            num_crashes = self._blame(reason, self.frontend.generations)
            recent = recent[: len(recent) - max(0, num_crashes - 1)]  # all crashes by one request count as one
        self._failures = [*recent, now]
        if len(recent) < self._max_restarts:
            self._note(reason)
            self._set_health("recovering", reason)
        else:
            self._fail(f"{reason}; given up after {counted(len(recent), 'restart')} within {self._restart_window:g} s")
        _close(executor)

    def _blame(self, reason: str, live: list[Generation]) -> int:
        """End the generation that has caused a crash with these live; return its crashes, 0 if none is known."""
        cause = self.quarantine.on_crash(live)
        if cause is None:
            return 0
        generation, num_crashes = cause
        message = f"this request crashed the engine {num_crashes} times, the last time running alone: {reason}"
        same = [g for g in self.frontend.generations if g is generation or self.quarantine.refuses(g)]
        log.error("request %d ends, %d like it: %s", generation.number, len(same) - 1, message)
        self.frontend.cancel(same, message)
        self.queues.fail(same, RequestCrashedEngine(message))
        return num_crashes

    def _reroute(self, lost: RequestsLost) -> None:
        """Continue the requests of a failed replica in others, with their generated tokens."""
        rerouted = self.frontend.withdraw(lost.uids)
        message = f"a replica has failed, {counted(len(rerouted), 'request')} rerouted to others: {lost}"
        self._note(message)
        log.error("%s", message)
        stopped = [*rerouted, *self.quarantine.paused]
        self._blame(str(lost), rerouted)
        paused = self.quarantine.paused
        for generation in stopped:
            if generation not in paused and not generation.finished:
                self.frontend.resume(generation)

    def _test_next_suspect(self) -> None:
        """Run the next suspect alone, once the last one has been cleared."""
        to_pause, to_resume = self.quarantine.advance()
        if to_pause:  # a message to the ranks
            self.frontend.withdraw(output.request.uid for generation in to_pause for output in generation.outputs)
        for generation in to_resume:
            self.frontend.resume(generation)

    def _restart(self) -> None:
        started = time.perf_counter()
        self.health = replace(self.health, restarts=self.health.restarts + 1)
        if gc.get_freeze_count():  # a runner in this process has frozen all objects, itself included
            gc.unfreeze()
            gc.collect()
        try:
            executor = self._start_executor()
        except (PlacementError, ValueError, OSError) as error:  # another attempt would not help
            self._fail(f"the ranks cannot be started again: {error}; before, {self.health.reason}")
            return
        count = len(self.quarantine.suspects)
        if count:
            requests = counted(count, "request")
            log.warning("%s live in two crashes made no progress; they run one at a time", requests)
        self.frontend.resubmit(executor, self.quarantine.paused)
        self._set_health("ready")
        message = f"back after {time.perf_counter() - started:.1f} s with {counted(len(self.frontend.live), 'output')}"
        self._note(message)
        log.info("%s", message)

    def _fail(self, reason: str) -> None:
        """Fail for good: end all requests, and refuse new ones, with this reason."""
        log.error("%s", reason)
        self._note(reason)
        self._set_health("failed", reason)
        generations = self.queues.generations
        self.frontend.cancel(generations, reason)
        self.queues.fail(generations, EngineFailed(reason))

    def _replace_executor(self) -> Executor:
        """Put a NullExecutor in the executor's place; return the executor, to be closed."""
        executor = self.frontend.executor
        self._previous_stats = self.stats
        self.frontend.executor = NullExecutor(executor)
        return executor

    def _set_health(self, state: Literal["ready", "recovering", "failed"], reason: str = "") -> None:
        self.health = Health(state, reason, restarts=self.health.restarts)

    def _note(self, event: str) -> None:
        self.events.append(EngineEvent(time.time(), event))


def _close(executor: Executor) -> None:
    try:
        executor.close()
    except Exception:  # Ray raises any if more than the ranks is broken
        log.exception("the ranks did not end in order")
