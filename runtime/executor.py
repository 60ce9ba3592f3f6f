"""The front end's client of the engine, and its implementation for one rank in this process.

An Executor takes requests and returns the outputs of steps. Unlike vLLM's model executor, it includes the scheduler.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from ..comm.base import SingleRank
from ..comm.message_sockets import PullSocket, PushSocket
from .config import Config
from .engine import Engine
from .leader_loop import lead
from .limits import Limits
from .model.model_config import ModelConfig
from .plan import StepOutput
from .rank_location import RankLocation
from .request import Request
from .scheduler.scheduler import Scheduler
from .startup import LoadedRank, plan_limits
from .startup_timer import StartupTimer
from .stats import EngineStats, Profile


class EngineClosed(RuntimeError):
    """The engine, or the `LLM` around it, was ended by `close` and takes no calls any more."""


class Wakeup(Protocol):
    """An event that other threads set to wake the thread of an executor (launch's WakeupEvent)."""

    def wait(self) -> None:
        """Wait until the event is set, without a time limit."""


class Executor(Protocol):
    """The ranks that compute requests; every request must keep `limits`."""

    limits: Limits
    startup: dict[str, float]  # the result of StartupTimer.record

    @property
    def stats(self) -> EngineStats:
        """The engine's counters at the last `poll`; the object is not updated later."""

    @property
    def locations(self) -> Sequence[RankLocation]:
        """The hosts and processes of the ranks, in rank order; replicas come and go."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once."""

    def cancel(self, uids: Sequence[int]) -> None:
        """End requests early; each still gets a RequestEnd with reason "abort", unless it has ended already."""

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """Return the outputs since the last call; wait up to timeout_s for the first. Raises if the ranks failed."""

    def wait(self, wakeup: Wakeup) -> None:
        """While no request is live: wait until `wakeup` is set, or the ranks need another `poll`."""

    def start_profile(self, num_steps: int) -> None:
        """Trace up to `num_steps` decode steps on rank 0, from the next step on; requests must have been submitted."""

    def take_profile(self) -> Profile | None:
        """Return the profile once, after the `poll` that has received it; None otherwise."""

    def close(self) -> None:
        """End the ranks and free their memory; live requests are dropped."""


class LocalExecutor:
    """One rank in this process, without Ray; a step runs inside `poll`."""

    def __init__(self, config: Config, model: ModelConfig, folder: Path) -> None:
        if config.tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size={config.tensor_parallel_size} needs Ray; in one process it is 1")
        timer = StartupTimer()
        resolved = config.resolved(model, cuda=torch.cuda.is_available())
        loaded = LoadedRank(resolved, model, folder, SingleRank(), timer)
        self.memory = loaded.plan_memory()
        self.limits = plan_limits(config, resolved, model, self.memory)
        runner = loaded.allocate(self.limits)
        location = RankLocation(0, socket.gethostname(), os.getpid())
        self.locations = [location.with_memory(self.memory, self.limits)]
        self.startup = timer.record()
        engine = Engine(Scheduler(self.limits), runner, publish=lambda plan: None, overlap=runner.overlaps)
        self._open: Engine | None = engine  # None after `close`, so that its memory is freed
        self._stats = engine.stats

    def submit(self, requests: Sequence[Request]) -> None:
        self._engine.add(requests)

    def cancel(self, uids: Sequence[int]) -> None:
        if self._open is not None:
            self._open.cancel(uids)

    def poll(self, timeout_s: float) -> list[StepOutput]:
        return [self._engine.step()] if self._engine.has_work else []

    def wait(self, wakeup: Wakeup) -> None:
        wakeup.wait()

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(self._stats)

    def start_profile(self, num_steps: int) -> None:
        self._engine.start_profile(num_steps)

    def take_profile(self) -> Profile | None:
        return None if self._open is None else self._open.take_profile()

    def lead(self, inbox: PullSocket, outputs: PushSocket) -> None:
        """Work for a front end in another process until its Stop command, in place of all calls but `close`."""
        lead(self._engine, inbox, outputs)

    def close(self) -> None:
        """End the engine and free its memory; safe to call twice."""
        engine, self._open = self._open, None
        if engine is not None:
            engine.runner.close()

    @property
    def _engine(self) -> Engine:
        if self._open is None:
            raise EngineClosed("the rank was ended by close(); make a new one")
        return self._open
