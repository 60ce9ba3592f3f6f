"""The engine's client side of one rank in another process on this machine, without Ray.

Python runs one thread of a process at a time. In the process of a server, the steps of the engine and the answers to
its clients would wait for each other, and an error of the GPU would end both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..comm.message_sockets import PullSocket, WakeupEvent
from ..runtime.config import Config
from ..runtime.executor import EngineClosed, Wakeup
from ..runtime.plan import StepOutput
from ..runtime.request import Request
from ..runtime.startup_timer import summary
from ..runtime.stats import EngineStats, Profile
from .child_process import ChildFailed, ChildProcess, calling
from .errors import RankFailed
from .leader_client import LeaderClient
from .rank_process import LOOPBACK, RankError, RankReady, RankStart, main
from .signals import Undo

log = logging.getLogger(__name__)
STOP_S = 5.0  # after the Stop command the process may take this long to end


class ProcessExecutor:
    """One rank in a child process; ready when the constructor returns. `wakeup` is set when the process fails.

    Raises ValueError for a user's mistake, and RankFailed if the process fails or is not ready within startup_timeout.
    """

    def __init__(self, config: Config, folder: Path, wakeup: WakeupEvent) -> None:
        self._failure: RankFailed | None = None
        self._wakeup, self._closed = wakeup, False
        with Undo() as stack:
            outputs = PullSocket(LOOPBACK)
            stack.callback(outputs.close)
            self._process = ChildProcess(calling(main), inherits_stderr=True)
            stack.callback(self._process.close)
            level = logging.getLevelName(log.getEffectiveLevel()).lower()
            ready = self._start(RankStart(config, str(folder), outputs.address, level), config.startup_timeout)
            self.limits, self.locations, self.startup = ready.limits, ready.locations, ready.startup
            self._leader = LeaderClient(outputs, ready.inbox, wakeup, config.step_timeout)
            self._watcher = threading.Thread(target=self._watch, name="lockstep-watch", daemon=True)
            self._watcher.start()
            stack.callback(self._watcher.join, STOP_S)
            stack.callback(self._leader.close)
            self._open = stack.pop_all()
        log.info("one rank in process %d, without Ray: %s", self._process.pid, summary(self.startup))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once."""
        self._check()
        self._leader.submit(requests)

    def cancel(self, uids: Sequence[int]) -> None:
        """End requests early."""
        if not self._closed:
            self._leader.cancel(uids)

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """Do as Executor.poll, but return early when the wakeup event is set."""
        if not self._closed:
            outputs = self._leader.receive(timeout_s if self._failure is None else 0.0)
            if outputs:
                return outputs
        self._check()
        if self._leader.time_left <= 0:
            raise RankFailed(f"no step has ended for {self._leader.silence_s:.0f} s, step_timeout is over: {self}")
        return []

    def wait(self, wakeup: Wakeup) -> None:
        """Wait for `wakeup`, which must be that of the constructor."""
        wakeup.wait()

    @property
    def stats(self) -> EngineStats:
        """The engine's counters in the last report."""
        return self._leader.stats

    def start_profile(self, num_steps: int) -> None:
        """Trace up to `num_steps` decode steps."""
        self._check()
        self._leader.start_profile(num_steps)

    def take_profile(self) -> Profile | None:
        """Return a complete profile, once."""
        return self._leader.take_profile()

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._closed = True
        self._open.close()

    def __str__(self) -> str:
        return f"rank 0 in process {self._process.pid}"

    def _start(self, start: RankStart, timeout_s: float) -> RankReady:
        try:
            answer = self._process.request(msgspec.json.encode(start), timeout_s)
        except TimeoutError:
            raise RankFailed(f"{self} is not ready within startup_timeout; raise it, or look there") from None
        except ChildFailed as error:
            raise RankFailed(f"{self} died: {error}") from None
        result: RankReady | RankError = msgspec.convert(answer, RankReady | RankError, builtin_types=())
        if isinstance(result, RankReady):
            return result
        raise ValueError(result.message) if result.is_mistake else RankFailed(f"{self} failed: {result.message}")

    def _watch(self) -> None:
        """Wait until the process ends, and set `_failure` to the cause."""
        try:
            reason = f"failed: {msgspec.convert(self._process.answer(None), RankError).message}"
        except ChildFailed as error:
            reason = f"died: {error}"
        if not self._closed:
            self._failure = RankFailed(f"{self} {reason}")
            self._wakeup.set()

    def _check(self) -> None:
        if self._closed:
            raise EngineClosed("the rank was ended by close(); make a new one")
        if self._failure is not None:
            raise self._failure
