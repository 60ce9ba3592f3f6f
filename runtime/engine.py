"""The leader's loop body: schedule a step, tell the followers, run it, take in what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import Finished, StepOutput, StepPlan
from .request import Request
from .runner import Runner
from .scheduler import Scheduler


class Engine:
    """One group of ranks, seen from rank 0; `publish` sends each plan to the followers before it runs here."""

    def __init__(self, scheduler: Scheduler, runner: Runner, publish: Callable[[StepPlan], None]) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._publish = publish
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
        return self.scheduler.has_work or bool(self._ended)

    def step(self) -> StepOutput:
        """Run one step, if there is anything to compute; returns what it produced and who ended."""
        scheduled = self.scheduler.schedule()
        output = StepOutput([], [], [])
        if scheduled is not None:
            self._publish(scheduled.plan)
            sampled = self.runner.execute(scheduled.plan)
            output = self.scheduler.commit(scheduled, sampled.tokens, sampled.logprobs)
        output.finished.extend(self._ended)
        self._ended.clear()
        return output
