"""The client of a leader in another process: commands to it and the reports of its steps, over ZeroMQ."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ..comm.message_sockets import Address, PullSocket, PushSocket, WakeupEvent
from ..runtime.plan import Cancel, StartProfile, StepOutput, Stop, Submit, decode_report, encode
from ..runtime.request import Request
from ..runtime.stats import EngineStats, Profile


class LeaderClient:
    """Sends commands to `inbox` and receives reports from `outputs`, which the caller closes after this client.

    report_timeout_s   seconds without a report, while requests are live, after which the leader counts as hung
    """

    def __init__(self, outputs: PullSocket, inbox: Address, wakeup: WakeupEvent, report_timeout_s: float) -> None:
        self.stats = EngineStats()  # the counters in the last report
        self._outputs, self._commands, self._wakeup = outputs, PushSocket(inbox), wakeup
        self._report_timeout_s = report_timeout_s
        self._live: set[int] = set()  # uids of the requests that have not ended
        self._last_report = 0.0  # time.perf_counter at the last report, or at the first request after an idle time
        self._profile: Profile | None = None

    @property
    def silence_s(self) -> float:
        """The seconds since the last report, or since the first request after an idle time."""
        return time.perf_counter() - self._last_report

    @property
    def time_left(self) -> float:
        """The seconds until the leader counts as hung: a leader that hangs reports nothing."""
        return self._report_timeout_s - self.silence_s if self._live else math.inf

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once."""
        if not self._live:
            self._last_report = time.perf_counter()
        self._live.update(request.uid for request in requests)
        self._commands.send(encode(Submit(list(requests))))

    def cancel(self, uids: Sequence[int]) -> None:
        """End requests early."""
        self._commands.send(encode(Cancel(list(uids))))

    def receive(self, timeout_s: float) -> list[StepOutput]:
        """Return the outputs since the last call; wait up to timeout_s for the first, or until the wakeup is set."""
        messages = self._outputs.receive(max(0.0, min(timeout_s, self.time_left)), self._wakeup)
        return self._update(messages) if messages else []

    def start_profile(self, num_steps: int) -> None:
        """Trace up to `num_steps` decode steps."""
        self._commands.send(encode(StartProfile(num_steps)))

    def take_profile(self) -> Profile | None:
        """Return the profile that the last reports have brought, once."""
        profile, self._profile = self._profile, None
        return profile

    def wake(self) -> None:
        """End a `receive` of another thread."""
        self._wakeup.set()

    def close(self) -> None:
        """Tell the leader to stop."""
        self._commands.send(encode(Stop()))
        self._commands.close()

    def _update(self, messages: list[bytes]) -> list[StepOutput]:
        self._last_report = time.perf_counter()
        reports = [decode_report(message) for message in messages]
        self.stats = reports[-1].stats
        self._profile = next((report.profile for report in reports if report.profile is not None), self._profile)
        outputs = [report.output for report in reports]
        self._live.difference_update(finished.uid for output in outputs for finished in output.finished)
        return outputs
