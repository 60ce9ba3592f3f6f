"""The Executor over Ray actors: starts the ranks, watches them, and ends them all with the first one's cause.

Requests and results travel over our own sockets (channel.py); Ray places the actors, starts them and reports deaths.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..runtime.config import Config
from ..runtime.executor import plan_limits
from ..runtime.model.config import ModelConfig
from ..runtime.plan import Admit, Cancel, StepOutput, Stop, decode_output, encode
from ..runtime.request import Request
from .channel import Inbox, Outbox
from .placement import has_gpus, place, start_ray
from .worker import Endpoint, Loaded, Worker

log = logging.getLogger(__name__)
FORWARDED = ("NCCL_", "GLOO_", "HF_", "HUGGING_FACE_", "TORCH_", "CUDA_LAUNCH_")
WATCH_S = 0.5
OTHERS_S = 1.0  # after one rank failed, for the others to say why they did
STOP_S = 5.0


class RankFailed(RuntimeError):
    """A rank died or raised; the message says which, where and why."""


@dataclass(frozen=True)
class Failure:
    """What Ray says of a rank that ended."""

    rank: int
    error: BaseException | None  # None: it returned, though nobody told it to

    @property
    def is_cause(self) -> bool:
        """A death or a bug rather than the echo of another rank's: a CommError only says that a peer is gone."""
        return not (isinstance(self.error, RayTaskError) and type(self.error.cause).__name__ == "CommError")

    def describe(self, where: str) -> str:
        if self.error is None:
            return f"{where} ended by itself"
        if isinstance(self.error, RayTaskError):
            return f"{where} failed: {type(self.error.cause).__name__}: {self.error.cause}"
        return f"{where} died: {_reason_of_death(self.error)}"


class RayExecutor:
    """`config.tensor_parallel_size` ranks as Ray actors; ready when the constructor returns."""

    def __init__(self, config: Config, model: ModelConfig, folder: Path) -> None:
        model.check_tensor_parallel(config.tensor_parallel_size)
        self._closed = False
        self._failure: RankFailed | None = None
        self._actors: list[Any] = []
        self._endpoints: list[Endpoint] = []
        self._group = None
        self._owns_ray = start_ray(config)
        try:
            self._start(config, model, folder)
        except BaseException:
            self.close()
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        self._commands.send(encode(Admit(list(requests))))

    def cancel(self, uids: Sequence[int]) -> None:
        self._commands.send(encode(Cancel(list(uids))))

    def poll(self, timeout_s: float) -> list[StepOutput]:
        deadline = time.perf_counter() + timeout_s
        while True:
            wait = max(0.0, min(WATCH_S, deadline - time.perf_counter()))
            messages = self._outputs.receive(wait)
            if messages or time.perf_counter() >= deadline:
                return [decode_output(m) for m in messages]
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """Stop the ranks and everything that was started for them; returns when the actors' processes are gone."""
        if self._closed:
            return
        self._closed = True
        if ray.is_initialized():
            if hasattr(self, "_commands") and self._failure is None:
                self._commands.send(encode(Stop()))
                ray.wait(self._running, num_returns=len(self._running), timeout=STOP_S)
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                remove_placement_group(self._group)
            if self._owns_ray:
                ray.shutdown()
        for channel in ("_commands", "_outputs"):
            if hasattr(self, channel):
                getattr(self, channel).close()

    # -- start

    def _start(self, asked: Config, model: ModelConfig, folder: Path) -> None:
        started = time.perf_counter()
        config = asked.resolved(model, cuda=has_gpus())
        if Path(asked.model).is_dir():  # a relative path means something else in the actors; a hub id does not
            config = replace(config, model=str(folder.resolve()))
        self._group = place(config)
        deadline = time.perf_counter() + config.startup_timeout
        self._actors = [self._start_actor(rank, config) for rank in range(config.tensor_parallel_size)]
        ip = "127.0.0.1" if self._owns_ray else None  # our own cluster is this machine: keep off the network
        self._endpoints = self._all("bind", deadline, ip)
        self._outputs = Inbox(ip or ray.util.get_node_ip_address())
        loaded: list[Loaded] = self._all("load", deadline, self._endpoints, self._outputs.address)
        for endpoint, report in zip(self._endpoints, loaded, strict=True):
            log.info("%s: %s", endpoint, _describe(report, config))
        log.info("communication: %s", loaded[0].communication)
        self.limits = plan_limits(asked, config, model, min(report.num_pages for report in loaded))
        self._all("allocate", deadline, self.limits)
        self._running = [actor.run.remote() for actor in self._actors]
        self._commands = Outbox(self._endpoints[0].inbox)
        threading.Thread(target=self._watch, name="lockstep-watch", daemon=True).start()
        log.info("%d ranks ready in %.1f s", len(self._actors), time.perf_counter() - started)

    def _start_actor(self, rank: int, config: Config) -> Any:
        assert self._group is not None
        environment = {k: v for k, v in os.environ.items() if k.startswith(FORWARDED)}
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=rank)
        options = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=config.gpus_per_rank if config.device == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
        )
        return options.remote(rank, config.tensor_parallel_size, config, environment)

    def _all(self, method: str, deadline: float, *arguments: Any) -> list[Any]:
        """Call `method` on every rank and wait for all answers; raises the first cause if one fails or is late."""
        calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        late = list(calls)
        while late and time.perf_counter() < deadline:
            _, late = ray.wait(late, num_returns=len(late), timeout=WATCH_S)
            failures = [f for f in map(_outcome, range(len(calls)), calls) if f is not None]
            if failures:
                self._raise(self._find_cause(failures, calls))
        if late:
            ranks = ", ".join(self._where(calls.index(c)) for c in late)
            raise RankFailed(f"start-up: no answer to {method} from {ranks} within startup_timeout")
        return [ray.get(call) for call in calls]

    # -- watch

    def _watch(self) -> None:
        """Wait for the first rank whose `run` ends, and note why (on a thread of its own)."""
        while not self._closed:
            try:
                done, _ = ray.wait(self._running, num_returns=1, timeout=WATCH_S)
            except RayError:
                return
            if done and not self._closed:
                failures = [f for r, c in enumerate(self._running) if (f := _outcome(r, c, must_run=True)) is not None]
                cause = self._find_cause(failures, self._running)
                self._failure = RankFailed(cause.describe(self._where(cause.rank)))
                log.error("%s; ending all ranks", self._failure)
                for actor in self._actors:
                    ray.kill(actor)
                return

    def _find_cause(self, failures: list[Failure], calls: list[Any]) -> Failure:
        """Of several ranks that failed together, the one that the others followed."""
        if not any(f.is_cause for f in failures):
            ray.wait(calls, num_returns=len(calls), timeout=OTHERS_S)
            failures = [f for f in map(_outcome, range(len(calls)), calls) if f is not None] or failures
        return next((f for f in failures if f.is_cause), failures[0])

    def _raise(self, failure: Failure) -> None:
        """A user's mistake as the ValueError it is; anything else as RankFailed."""
        where = self._where(failure.rank)
        if isinstance(failure.error, RayTaskError) and isinstance(failure.error.cause, ValueError):
            raise ValueError(f"{failure.error.cause} ({where})") from failure.error
        raise RankFailed(failure.describe(where)) from failure.error

    def _where(self, rank: int) -> str:
        return str(self._endpoints[rank]) if rank < len(self._endpoints) else f"rank {rank}"


def _outcome(rank: int, call: Any, must_run: bool = False) -> Failure | None:
    """Why a call failed; None if it has not (yet), or has returned and was allowed to."""
    try:
        ray.get(call, timeout=0)
    except GetTimeoutError:
        return None
    except RayError as error:
        return Failure(rank, error)
    return Failure(rank, None) if must_run else None


def _reason_of_death(error: BaseException) -> str:
    """The one line of Ray's report that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit" in line.lower()] or lines[:1] or [type(error).__name__]
    return telling[0].split(" There are some potential")[0]


def _describe(report: Loaded, config: Config) -> str:
    weights = f"{report.weight_bytes / 2**20:.1f} MiB of weights in {report.seconds:.1f} s"
    return f"{weights}, {config.dtype} on {report.device}"
