"""The leader's loop body: schedule a step, tell the followers, launch it, take in what came.

With overlap, a step is scheduled and launched while the one before still runs: its inputs are read on the device from
where the sampler leaves them, and the host learns the tokens one step later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import Finished, StepOutput, StepPlan
from .request import Request
from .runner import Runner, Sampled
from .scheduler import Scheduled, Scheduler


class Engine:
    """One group of ranks, seen from rank 0; `publish` sends each plan to the followers before it runs here."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, publish: Callable[[StepPlan], None], *, overlap: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._publish = publish
        self._overlap = overlap
        self._running: tuple[Scheduled, Callable[[], Sampled]] | None = None
        self._ended: list[Finished] = []  # outside of a step: refused or cancelled

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests; one that can never run ends at once with the reason, and hurts nobody else."""
        for request in requests:
            try:
                self.scheduler.add(request)
            except ValueError as error:
                self._ended.append(Finished(request.uid, "abort", error=str(error)))

    def cancel(self, uids: Sequence[int]) -> None:
        """End these requests with reason "abort", unless they have ended."""
        for uid in uids:
            finished = self.scheduler.cancel(uid)
            if finished is not None:
                self._ended.append(finished)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._running is not None or bool(self._ended)

    def step(self) -> StepOutput:
        """Launch a step, if there is anything to compute, and take in a finished one: its tokens, and who ended."""
        before, self._running = self._running, self._launch()
        if not self._overlap:
            before, self._running = self._running, None
        output = StepOutput([], [], [])
        if before is not None:
            scheduled, wait = before
            sampled = wait()
            output = self.scheduler.commit(scheduled, sampled.tokens, sampled.logprobs)
        output.finished.extend(self._ended)
        self._ended.clear()
        return output

    def _launch(self) -> tuple[Scheduled, Callable[[], Sampled]] | None:
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return None
        self._publish(scheduled.plan)
        return scheduled, self.runner.launch(scheduled.plan)
