"""The ranks as a group of Ray actors: started together, watched together, and ended together.

Any rank's failure ends the group, because the others cannot continue without it. The others fail a moment later; the
group reports the failure that caused theirs.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...comm.base import CommError
from ...comm.message_text import first_line
from ...runtime.config import Config
from ..errors import RankFailed
from .connection import Connection
from .worker import Endpoint, RankActor, Worker

# Prefixes of variables that are passed on to the ranks. All other settings of a rank are in Config.
FORWARDED = ("NCCL_", "GLOO_", "OMP_", "HF_", "HUGGING_FACE_", "TORCH_", "CUDA_LAUNCH_")
WATCH_S = 0.5
OTHER_FAILURES_WAIT_S = 2.0  # after a rank has failed, Ray may take this long to report the others
LAST_LINES, LAST_BYTES = 10, 8192  # an error shows this much of a failed rank's stderr
RAY_MARKS = (":job_id:", ":actor_name:")  # beginnings of the lines that Ray itself writes to stderr
KILL_S = 5.0  # Ray may take this long to end the processes
TABLE_HEAD = ("rank", "node", "address", "interface", "GPU", "pid")


@dataclass(frozen=True)
class RankFailure:
    """A rank's call that has ended too early, and Ray's report of it."""

    rank: int
    error: RayError | None  # None: the call returned

    @property
    def cause(self) -> BaseException | None:
        """The exception that the rank raised; None if it died."""
        return self.error.cause if isinstance(self.error, RayTaskError) else None

    @property
    def is_secondary(self) -> bool:
        """True if another rank may have caused this failure: a CommError reports a peer that is gone or silent."""
        return isinstance(self.cause, CommError)

    @property
    def reason(self) -> str:
        if self.error is None:
            return "ended by itself"
        if self.cause is not None:
            return f"failed: {type(self.cause).__name__}: {first_line(self.cause)}"
        return f"died: {_reason_of_death(self.error)}"


class ActorGroup:
    """An actor in each bundle of `placement_group`, by default a Worker; `config` is resolved. Always call `close`.

    The connection's `wakeup` is set when there is a `failure`. `call` raises what the connection's `check` raises.
    """

    def __init__(
        self,
        config: Config,
        placement_group: PlacementGroup,
        connection: Connection,
        actor: type[RankActor] | None = None,
    ) -> None:
        self._placement_group, self._connection = placement_group, connection
        self.endpoints: list[Endpoint] = []  # set by the caller of `bind`
        self.failure: RankFailed | None = None
        self._calls: list[Any] = []  # the latest call of each rank
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="lockstep-watch", daemon=True)
        ranks = range(config.tensor_parallel_size)
        self._actors = [_start_actor(actor or Worker, rank, config, placement_group) for rank in ranks]

    def call(self, method: str, deadline: float, *arguments: Any) -> list[Any]:
        """Call `method` on every rank and return the results in rank order.

        If a rank fails, raises its ValueError (a user's mistake), and RankFailed for any other cause. Raises RankFailed
        if a result has not come by `deadline` (of time.perf_counter).
        """
        self._calls = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        silent = self._calls
        while silent:
            left = deadline - time.perf_counter()
            if left <= 0:
                ranks = ", ".join(self._describe(self._calls.index(call)) for call in silent)
                raise RankFailed(f"no answer to {method} from {ranks} within startup_timeout; raise it, or look there")
            _, silent = ray.wait(self._calls, num_returns=len(self._calls), timeout=min(WATCH_S, left))
            self._connection.check()
            failures = [failure for failure in self._ended() if failure.error is not None]
            if failures:
                self._raise(self._find_cause(failures))
        return list(ray.get(self._calls))

    def run(self) -> None:
        """Start the ranks' `run`, and a thread that watches it."""
        self._calls = [actor.run.remote() for actor in self._actors]
        self._watcher.start()

    def fail(self, reason: str, rank: int | None = None) -> None:
        """End all ranks and set `failure`, unless it is set; the last lines of `rank`'s stderr are kept in it."""
        self.failure = self.failure or RankFailed(reason, self._stderr_tail(rank))
        self._connection.wakeup.set()
        for actor in self._actors:
            ray.kill(actor)

    def close(self, timeout_s: float) -> None:
        """Wait up to timeout_s for the ranks to end, then kill them; if Ray is lost, they have ended."""
        self._closing.set()
        self._connection.while_usable(self._end, timeout_s)
        if self._watcher.is_alive():
            self._watcher.join()  # it needs Ray, which may be shut down next

    def _end(self, timeout_s: float) -> None:
        if self.failure is None and self._watcher.is_alive():
            ray.wait(self._calls, num_returns=len(self._calls), timeout=timeout_s)
        for actor in self._actors:
            ray.kill(actor)
        if self._calls:
            ray.wait(self._calls, num_returns=len(self._calls), timeout=KILL_S)

    def _watch(self) -> None:
        """Wait until a rank's `run` ends, and set `failure` to the cause."""
        try:
            while ray.is_initialized() and not self._closing.is_set():
                done, _ = ray.wait(self._calls, num_returns=1, timeout=WATCH_S)
                if done and not self._closing.is_set():
                    cause = self._find_cause(self._ended())
                    silent_ranks = self._silent_ranks() if cause.is_secondary else ""
                    self.fail(f"{self._describe(cause.rank)} {cause.reason}{silent_ranks}", cause.rank)
                    return
        finally:  # Ray ends this thread when the user shuts Ray down
            if not self._closing.is_set():
                self.failure = self.failure or RankFailed("Ray was shut down with ranks running; close the LLM first")
                self._connection.wakeup.set()

    def _find_cause(self, failures: list[RankFailure]) -> RankFailure:
        if all(failure.is_secondary for failure in failures):
            ray.wait(self._calls, num_returns=len(self._calls), timeout=OTHER_FAILURES_WAIT_S)
            failures = self._ended()
        return min(failures, key=lambda failure: failure.is_secondary)

    def _silent_ranks(self) -> str:
        """Return text naming the ranks without a failure, for which the failed ones may have waited."""
        ended = {failure.rank for failure in self._ended()}
        silent = [self._describe(rank) for rank in range(len(self._calls)) if rank not in ended]
        return f"; no response from {', '.join(silent)}" if silent else ""

    def _ended(self) -> list[RankFailure]:
        ended, _ = ray.wait(self._calls, num_returns=len(self._calls), timeout=0)
        return [RankFailure(rank, _error_of(call)) for rank, call in enumerate(self._calls) if call in ended]

    def _raise(self, failure: RankFailure) -> None:
        rank = self._describe(failure.rank)
        if isinstance(failure.cause, ValueError):
            raise ValueError(f"{failure.cause} ({rank})") from failure.error
        raise RankFailed(f"{rank} {failure.reason}", self._stderr_tail(failure.rank)) from failure.error

    def _stderr_tail(self, rank: int | None) -> str:
        """Return the last lines of the rank's stderr, if it is a file on this machine."""
        if rank is None or not self.endpoints or self.endpoints[rank].host != socket.gethostname():
            return ""
        path = Path(self.endpoints[rank].stderr)
        if not path.is_file():  # a pipe or a terminal, or on another host of the same name
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if not line.startswith(RAY_MARKS)][-LAST_LINES:])

    def _describe(self, rank: int) -> str:
        """Return the rank's number and host: from its endpoint, or else from its bundle's node."""
        if self.endpoints:
            return str(self.endpoints[rank])
        node = placement_group_table(self._placement_group)["bundles_to_node_id"][rank]
        return f"rank {rank} on {next(n['NodeManagerAddress'] for n in ray.nodes() if n['NodeID'] == node)}"


def _start_actor(actor_type: type[RankActor], rank: int, config: Config, placement_group: PlacementGroup) -> Any:
    actor = ray.remote(actor_type).options(
        num_cpus=1,
        num_gpus=config.gpus_per_rank if config.device == "cuda" else 0,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index=rank),
    )
    return actor.remote(rank, config.tensor_parallel_size, config, forwarded_environment())


def forwarded_environment() -> dict[str, str]:
    """Return the variables of this process's environment that all ranks get."""
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}


def rank_table(endpoints: Sequence[Endpoint]) -> str:
    """Return a table of the ranks' places, and the names of the variables that they get: values may be secrets."""
    rows = [(str(e.rank), e.host, e.ip, e.interface or "?", ",".join(e.gpus) or "none", str(e.pid)) for e in endpoints]
    widths = [max(map(len, column)) for column in zip(TABLE_HEAD, *rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (TABLE_HEAD, *rows))
    lines = ["  ".join(row).rstrip() for row in cells]
    num_nodes = len({endpoint.host for endpoint in endpoints})
    title = f"{len(rows)} rank{'s' * (len(rows) > 1)} on {num_nodes} node{'s' * (num_nodes > 1)}"
    names = ", ".join(sorted(forwarded_environment())) or "nothing"
    return "\n  ".join([title, *lines, f"forwarded environment variables: {names}"])


def _error_of(call: Any) -> RayError | None:
    try:
        ray.get(call)
    except RayError as error:
        return error
    return None


def _reason_of_death(error: RayError) -> str:
    """Return the cause from Ray's report, which consists of a headline, indented details, the cause and advice.

    The details may be a traceback. The cause may continue in indented lines at the end of the report.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    is_indented = [line[0].isspace() for line in lines]
    num_indented = len(lines) - len(list(itertools.dropwhile(bool, reversed(is_indented))))
    details = [number for number, indented in enumerate(is_indented[: len(lines) - num_indented]) if indented]
    cause = lines[details[-1] + 1 :] if details else lines
    if not cause:
        return type(error).__name__
    text = ", ".join(line.strip() for line in (cause[0], *cause[len(cause) - num_indented :]))
    return re.split(r" Some common causes| There are some potential", text)[0]
