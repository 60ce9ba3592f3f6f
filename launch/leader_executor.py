"""The common part of the executors whose leader is another process: commands to it, its reports, and failures."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

from ..runtime.executor import EngineClosed, Wakeup
from ..runtime.plan import StepOutput
from ..runtime.request import Request
from ..runtime.stats import EngineStats, Profile
from .errors import RankFailed
from .leader_client import LeaderClient


class LeaderExecutor(ABC):
    """An Executor over a LeaderClient. A subclass starts the ranks and sets `_leader` and `_open`."""

    _leader: LeaderClient
    _open: ExitStack  # what `close` closes
    _closed = False

    def __init__(self) -> None:
        self._lock = threading.RLock()  # held while the sockets are in use, which another thread's `close` would end

    @property
    @abstractmethod
    def failure(self) -> RankFailed | None:
        """The failure of the ranks, once a thread has noticed it; it has set the wakeup event, too."""

    @abstractmethod
    def _fail(self, reason: str) -> None:
        """Set `failure`: the leader is silent."""

    def submit(self, requests: Sequence[Request]) -> None:
        self._check()
        self._leader.submit(requests)

    def cancel(self, uids: Sequence[int]) -> None:
        if not self._closed:
            self._leader.cancel(uids)

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """Do as Executor.poll, but return early when the wakeup event is set."""
        with self._lock:
            outputs = [] if self._closed else self._leader.receive(timeout_s if self.failure is None else 0.0)
        if outputs:
            return outputs
        self._check()
        if self._leader.time_left <= 0:
            self._fail(f"no step has ended for {self._leader.silence_s:.0f} s, step_timeout is over")
            self._check()
        return []

    def wait(self, wakeup: Wakeup) -> None:
        """Wait for `wakeup`, which must be the one that a failure sets."""
        wakeup.wait()

    def start_profile(self, num_steps: int) -> None:
        self._check()
        self._leader.start_profile(num_steps)

    def take_profile(self) -> Profile | None:
        return self._leader.take_profile()

    @property
    def stats(self) -> EngineStats:
        return self._leader.stats

    def close(self) -> None:
        """Stop the ranks and release their resources; safe to call twice. Ends a `poll` of another thread."""
        self._closed = True
        self._leader.wake()
        with self._lock:
            self._open.close()

    def _check(self) -> None:
        if self._closed:
            raise EngineClosed("the ranks were ended by close(); make new ones")
        if self.failure is not None:
            raise self.failure
