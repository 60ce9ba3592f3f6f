"""The ranks as a group of Ray actors: started together, watched together, and ended together.

Any rank's failure is the group's end, because the others cannot go on without it. Several ranks then fail within
moments of each other; the group reports the one that the others only followed.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...comm.base import CommError
from ...runtime.config import Config
from ..errors import RankFailed
from .rank_actor import Endpoint, RankActor
from .sockets import WakeupEvent
from .worker import Worker

# What an actor's environment does not have from its node. All else that a rank must know is in Config.
FORWARDED = ("NCCL_", "GLOO_", "OMP_", "HF_", "HUGGING_FACE_", "TORCH_", "CUDA_LAUNCH_")
WATCH_S = 0.5
OTHERS_S = 2.0  # after one rank failed, for Ray to report the others
LAST_LINES, LAST_BYTES = 10, 8192  # of a failed rank's stderr
RAYS_OWN = (":job_id:", ":actor_name:")  # lines that Ray puts there for its own use
KILL_S = 5.0  # for Ray to end the processes


@dataclass(frozen=True)
class Failure:
    """What Ray says of a rank's call that has ended."""

    rank: int
    error: RayError | None  # None: it returned, though nobody told it to

    @property
    def cause(self) -> BaseException | None:
        """The exception that the rank raised; None if it died."""
        return self.error.cause if isinstance(self.error, RayTaskError) else None

    @property
    def is_echo(self) -> bool:
        """Whether another rank's failure may be behind this one: a CommError says that a peer is gone or silent."""
        return isinstance(self.cause, CommError)

    @property
    def reason(self) -> str:
        if self.error is None:
            return "ended by itself"
        if self.cause is not None:
            return f"failed: {type(self.cause).__name__}: {_first_line(self.cause)}"
        return f"died: {_reason_of_death(self.error)}"


class ActorGroup:
    """An actor in each bundle of `group`, a Worker if not given; `config` is resolved. Call `close` in any case.

    `bell` rings when there is a `failure`; when `leaving` is set, nobody waits for the answer to a call any more.
    """

    def __init__(
        self,
        config: Config,
        group: PlacementGroup,
        bell: WakeupEvent,
        leaving: threading.Event,
        actor: type[RankActor] | None = None,
    ) -> None:
        self._bell, self._leaving = bell, leaving
        self.endpoints: list[Endpoint] = []  # set by whoever called `bind`
        self.failure: RankFailed | None = None
        self._group = group
        self._calls: list[Any] = []  # the last one of each rank
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="lockstep-watch", daemon=True)
        self._actors = [
            _start_actor(actor or Worker, rank, config, group) for rank in range(config.tensor_parallel_size)
        ]

    def call(self, method: str, deadline: float, *arguments: Any) -> list[Any]:
        """The results of `method` on every rank, in rank order.

        Raises the first cause if a rank fails: a user's mistake as the ValueError it is, anything else, and an answer
        that has not come by `deadline` (of time.perf_counter), as RankFailed.
        """
        self._calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        silent = self._calls
        while silent:
            left = deadline - time.perf_counter()
            if left <= 0:
                who = ", ".join(self._where(self._calls.index(call)) for call in silent)
                raise RankFailed(f"no answer to {method} from {who} within startup_timeout; raise it, or look there")
            _, silent = ray.wait(self._calls, num_returns=len(self._calls), timeout=min(WATCH_S, left))
            failures = [failure for failure in self._ended() if failure.error is not None]
            if failures:
                self._raise(self._find_cause(failures))
            if silent and self._leaving.is_set():
                raise RankFailed("the start was given up, because the service ends")
        return list(ray.get(self._calls))

    def run(self) -> None:
        """Let the ranks work, and watch them from a thread of its own."""
        self._calls = [actor.run.remote() for actor in self._actors]
        self._watcher.start()

    def fail(self, reason: str, rank: int | None = None) -> None:
        """End all ranks for this reason, unless there is one already; of `rank` its last words are kept."""
        self.failure = self.failure or RankFailed(reason, self._last_words(rank))
        self._bell.ring()
        for actor in self._actors:
            ray.kill(actor)

    def close(self, patience_s: float) -> None:
        """End all ranks, those that have not ended by themselves within patience_s by force."""
        self._closing.set()
        if self.failure is None and self._watcher.is_alive():
            ray.wait(self._calls, num_returns=len(self._calls), timeout=patience_s)
        for actor in self._actors:
            ray.kill(actor)
        if self._calls:
            ray.wait(self._calls, num_returns=len(self._calls), timeout=KILL_S)
        if self._watcher.is_alive():
            self._watcher.join()  # before Ray is shut down under it

    def _watch(self) -> None:
        """Wait for the first rank whose `run` ends, and note why."""
        try:
            while ray.is_initialized() and not self._closing.is_set():
                done, _ = ray.wait(self._calls, num_returns=1, timeout=WATCH_S)
                if done and not self._closing.is_set():
                    cause = self._find_cause(self._ended())
                    suspects = self._suspects() if cause.is_echo else ""
                    self.fail(f"{self._where(cause.rank)} {cause.reason}{suspects}", cause.rank)
                    return
        finally:  # Ray ends this thread where the user shuts it down
            if not self._closing.is_set():
                self.failure = self.failure or RankFailed("Ray was shut down under the ranks; close the LLM before")
                self._bell.ring()

    def _find_cause(self, failures: list[Failure]) -> Failure:
        """Of several ranks that failed together, the one that the others followed."""
        if all(failure.is_echo for failure in failures):
            ray.wait(self._calls, num_returns=len(self._calls), timeout=OTHERS_S)
            failures = self._ended()
        return min(failures, key=lambda failure: failure.is_echo)

    def _suspects(self) -> str:
        """Whom the ranks that failed may have waited for: those that Ray still takes for alive."""
        ended = {failure.rank for failure in self._ended()}
        silent = [self._where(rank) for rank in range(len(self._calls)) if rank not in ended]
        return f"; no word from {', '.join(silent)}" if silent else ""

    def _ended(self) -> list[Failure]:
        found = ((rank, _outcome(call)) for rank, call in enumerate(self._calls))
        return [Failure(rank, error) for rank, (ended, error) in found if ended]

    def _raise(self, failure: Failure) -> None:
        where = self._where(failure.rank)
        if isinstance(failure.cause, ValueError):
            raise ValueError(f"{failure.cause} ({where})") from failure.error
        raise RankFailed(f"{where} {failure.reason}", self._last_words(failure.rank)) from failure.error

    def _last_words(self, rank: int | None) -> str:
        """The end of what the rank has written to its stderr, if it runs on this machine and told where that goes."""
        if rank is None or not self.endpoints or self.endpoints[rank].host != socket.gethostname():
            return ""
        path = Path(self.endpoints[rank].stderr)
        if not path.is_file():  # a pipe or a terminal, or on another host of the same name
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if not line.startswith(RAYS_OWN)][-LAST_LINES:])

    def _where(self, rank: int) -> str:
        """The rank with its place: where it said it is, or where Ray was to start it."""
        if self.endpoints:
            return str(self.endpoints[rank])
        node = placement_group_table(self._group)["bundles_to_node_id"][rank]
        return f"rank {rank} on {next(n['NodeManagerAddress'] for n in ray.nodes() if n['NodeID'] == node)}"


def _start_actor(kind: type[RankActor], rank: int, config: Config, group: PlacementGroup) -> Any:
    actor = ray.remote(kind).options(
        num_cpus=1,
        num_gpus=config.gpus_per_rank if config.device == "cuda" else 0,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
    )
    return actor.remote(rank, config.tensor_parallel_size, config, forwarded())


def forwarded() -> dict[str, str]:
    """Of this process's environment, what the ranks get on every node."""
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}


def _outcome(call: Any) -> tuple[bool, RayError | None]:
    """Whether a call has ended, and the error if with one."""
    try:
        ray.get(call, timeout=0)
    except GetTimeoutError:
        return False, None
    except RayError as error:
        return True, error
    return True, None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _reason_of_death(error: RayError) -> str:
    """What happened, out of Ray's report: a headline, indented details or a traceback, what happened, and advice.

    What happened may go on in indented lines of its own: those at the end.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    more = len(lines) - len(list(itertools.dropwhile(_is_indented, reversed(lines))))
    details = [number for number, line in enumerate(lines[: len(lines) - more]) if _is_indented(line)]
    told = lines[details[-1] + 1 :] if details else lines
    if not told:
        return type(error).__name__
    happened = ", ".join(line.strip() for line in (told[0], *told[len(told) - more :]))
    return re.split(r" Some common causes| There are some potential", happened)[0]


def _is_indented(line: str) -> bool:
    return line[:1].isspace()
