"""The engine's client side of one rank in another process on this machine, without Ray.

Python runs one thread of a process at a time. In the process of a server, the steps of the engine and the answers to
its clients would wait for each other, and an error of the GPU would end both.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from ..comm.message_sockets import PullSocket, WakeupEvent
from ..runtime.config import Config
from ..runtime.startup_timer import READY, StartupTimer, log_ready
from .child_process import ChildFailed, ChildProcess, calling
from .errors import RankFailed
from .leader_client import LeaderClient
from .leader_executor import LeaderExecutor
from .rank_process import LOOPBACK, RankError, RankReady, RankStart, main
from .signals import Undo

log = logging.getLogger(__name__)
STOP_S = 5.0  # after the Stop command the process may take this long to end


class ProcessExecutor(LeaderExecutor):
    """One rank in a child process; ready when the constructor returns. `wakeup` is set when the process fails.

    Raises ValueError for a user's mistake, and RankFailed if the process fails or is not ready within startup_timeout.
    """

    def __init__(self, config: Config, folder: Path, wakeup: WakeupEvent) -> None:
        super().__init__()
        timer = StartupTimer()
        self._failure: RankFailed | None = None
        self._wakeup = wakeup
        with Undo() as stack:
            outputs = PullSocket(LOOPBACK)
            stack.callback(outputs.close)
            self._process = ChildProcess(calling(main), inherits_stderr=True)
            stack.callback(self._process.close)
            level = logging.getLevelName(log.getEffectiveLevel()).lower()
            with timer("process"):
                ready = self._start(RankStart(config, str(folder), outputs.address, level), config.startup_timeout)
                timer.add_slowest([{name: seconds for name, seconds in ready.startup.items() if name != READY}])
            self.limits, self.locations = ready.limits, ready.locations
            self._leader = LeaderClient(outputs, ready.inbox, wakeup, config.step_timeout)
            self._watcher = threading.Thread(target=self._watch, name="lockstep-watch", daemon=True)
            self._watcher.start()
            stack.callback(self._watcher.join, STOP_S)
            stack.callback(self._leader.close)
            self._open = stack.pop_all()
        self.startup = timer.record()
        log_ready(f"1 rank in process {self._process.pid}", self.startup)

    @property
    def failure(self) -> RankFailed | None:
        return self._failure

    def __str__(self) -> str:
        return f"rank 0 in process {self._process.pid}"

    def _fail(self, reason: str) -> None:
        self._failure = RankFailed(f"{reason}: {self}")

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
