"""The engine's client side over Ray actors: Ray starts and watches the ranks; messages use our own sockets."""

from __future__ import annotations

import atexit
import logging
import time
from contextlib import closing

import ray
from ray.util.placement_group import remove_placement_group

from ...comm.message_sockets import PullSocket
from ...comm.message_text import counted
from ...runtime.config import Config
from ...runtime.memory.memory_plan import loading_speed, tightest
from ...runtime.model.model_config import ModelConfig
from ...runtime.plan import StepOutput
from ...runtime.rank_location import RankLocation
from ...runtime.startup import plan_limits
from ...runtime.startup_timer import StartupTimer, log_ready
from ..errors import PlacementError, RankFailed
from ..leader_client import LeaderClient
from ..leader_executor import LeaderExecutor
from ..signals import Undo
from .actor_group import ActorGroup, rank_table
from .connection import Connection
from .placement import place
from .rank_warnings import log_rank_warnings
from .worker import AllocationReport, LoadReport

log = logging.getLogger(__name__)
STOP_S = 5.0  # after the Stop command the ranks may take this long to finish their step


class RayExecutor(LeaderExecutor):
    """`config.tensor_parallel_size` ranks as Ray actors; ready when the constructor returns.

    Without a connection it makes one, and is closed when the process exits. `grace_s` is the time after step_timeout
    in which a rank can report which other rank it waits for.
    """

    def __init__(
        self, config: Config, model: ModelConfig, connection: Connection | None = None, *, grace_s: float = 5.0
    ) -> None:
        super().__init__()
        model.check_tensor_parallel(config.tensor_parallel_size)
        self._report_timeout_s = config.step_timeout + grace_s
        self._phases = StartupTimer()
        with Undo() as stack:
            with self._phases("Ray"):
                self._connection = connection or stack.enter_context(closing(Connection(config)))
                self._connection.restore()
            with self._connection.naming_loss():
                self._start(config, model, stack)
            self._open = stack.pop_all()
        if connection is None:
            atexit.register(self.close)  # runs before Ray's exit, which would end the ranks under their watcher

    @property
    def failure(self) -> RankFailed | None:
        return self._connection.failure or self._ranks.failure

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """Do as LeaderExecutor.poll, but raise at once if Ray is lost: ranks on other machines may still send."""
        if self._connection.failure is not None:
            self._check()
        return super().poll(timeout_s)

    def close(self) -> None:
        """Stop the ranks and release their resources; safe to call twice."""
        atexit.unregister(self.close)
        super().close()

    def _start(self, user_config: Config, model: ModelConfig, stack: Undo) -> None:
        """Start the ranks; each step adds to `stack` what undoes it."""
        connection = self._connection
        if not ray.is_initialized():  # the next call would start Ray again, with other options
            raise PlacementError("Ray was shut down in this process; connect to it again")
        may_get_gpus = user_config.wait_for_resources is not None and not connection.has_gpus
        if user_config.device == "auto" and may_get_gpus:
            raise ValueError("device='auto' is open while nodes with GPUs may still join; give --device cuda or cpu")
        config = user_config.resolved(model, cuda=connection.has_gpus).with_absolute_model()
        with self._phases("placement"):
            placement_group = place(config, connection, again=connection.ranks_have_started)
        stack.callback(connection.while_usable, remove_placement_group, placement_group)
        deadline = time.perf_counter() + config.startup_timeout
        with self._phases("actors"):
            self._ranks = ranks = ActorGroup(config, placement_group, connection)
            stack.callback(ranks.close, STOP_S)
            ranks.endpoints = ranks.call("bind", deadline, connection.ip)
        if connection.ip is None:
            log.info("%s", rank_table(ranks.endpoints))
        self._outputs = PullSocket(connection.ip or ray.util.get_node_ip_address())
        stack.callback(self._outputs.close)
        self._load(user_config, config, model, deadline)
        ranks.run()
        connection.ranks_have_started = True
        inbox = ranks.endpoints[0].inbox
        self._leader = LeaderClient(self._outputs, inbox, connection.wakeup, self._report_timeout_s)
        stack.callback(self._leader.close)
        self.startup = self._phases.record()
        log_ready(counted(len(ranks.endpoints), "rank"), self.startup)

    def _load(self, user_config: Config, config: Config, model: ModelConfig, deadline: float) -> None:
        """Let the ranks load the model, plan the memory of all ranks, and let them allocate it."""
        ranks = self._ranks
        loaded: list[LoadReport] = ranks.call("load", deadline, ranks.endpoints, self._outputs.address)
        for endpoint, report in zip(ranks.endpoints, loaded, strict=True):
            weights = loading_speed(report.memory.weights, report.loading_s)
            log.info("%s: weights %s, %s on %s", endpoint, weights, config.dtype, report.device)
        log.info("communication: %s", loaded[0].communication)
        log_rank_warnings([report.warnings for report in loaded])
        self.memory = tightest([report.memory for report in loaded])
        self.limits = plan_limits(user_config, config, model, self.memory)
        self.locations = [
            RankLocation(e.rank, e.host, e.pid).with_memory(report.memory, self.limits)
            for e, report in zip(ranks.endpoints, loaded, strict=True)
        ]
        allocated: list[AllocationReport] = ranks.call("allocate", deadline, self.limits)
        log_rank_warnings([report.warnings for report in allocated])
        self._phases.add_slowest([report.phases for report in allocated])

    def _fail(self, reason: str) -> None:
        self._ranks.fail(f"{reason}: {self._ranks.endpoints[0]}")

    def _check(self) -> None:
        if self.failure is not None:
            self._connection.is_lost()  # look now: the ranks may have ended with Ray, a moment ago
        super()._check()
