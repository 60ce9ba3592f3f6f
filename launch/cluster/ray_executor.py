"""The Executor over Ray actors: Ray places, starts and watches the ranks, and is not on the path of a step.

Requests and results travel over our own sockets (channel.py).
"""

from __future__ import annotations

import atexit
import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing

import ray
from ray.util.placement_group import remove_placement_group

from ...runtime.config import Config
from ...runtime.executor import RankLocation, Wakeup
from ...runtime.memory.memory_plan import loading_speed, tightest
from ...runtime.messages import Admit, Cancel, StartProfile, Stop, decode_report, encode
from ...runtime.model.model_config import ModelConfig
from ...runtime.plan import StepOutput
from ...runtime.request import Request
from ...runtime.startup import plan_limits
from ...runtime.startup_timer import StartupTimer, summary
from ...runtime.stats import EngineStats, Profile
from ..errors import PlacementError, RankFailed
from ..signals import Undo
from .actor_group import ActorGroup, forwarded
from .connection import Connection, while_connected
from .placement import place
from .rank_table import roster
from .sockets import PullSocket, PushSocket
from .worker import Loaded

log = logging.getLogger(__name__)
STOP_S = 5.0  # for the ranks to finish their step when they are told to stop
GRACE_S = 5.0  # after step_timeout, for a rank to say itself whom it waits for


class RayExecutor:
    """`config.tensor_parallel_size` ranks as Ray actors; ready when the constructor returns.

    Without a connection it makes its own, and sees to its own end when the process exits.
    """

    def __init__(self, config: Config, model: ModelConfig, connection: Connection | None = None) -> None:
        model.check_tensor_parallel(config.tensor_parallel_size)
        self._patience_s = config.step_timeout + GRACE_S
        self._live: set[int] = set()  # the requests that have not ended
        self._heard = 0.0  # when a step was last heard of
        self._closed = False
        self._profile: Profile | None = None
        self.stats = EngineStats()
        self._phases = StartupTimer()
        with Undo() as stack:
            with self._phases("Ray"):
                used = connection or stack.enter_context(closing(Connection(config)))
            self._start(config, model, stack, used)
            self._open = stack.pop_all()
        if connection is None:
            atexit.register(self.close)  # before Ray's own exit, which would pull the ranks from under the watcher

    def submit(self, requests: Sequence[Request]) -> None:
        self._check()
        if not self._live:
            self._heard = time.perf_counter()
        self._live.update(request.uid for request in requests)
        self._commands.send(encode(Admit(list(requests))))

    def cancel(self, uids: Sequence[int]) -> None:
        if not self._closed:
            self._commands.send(encode(Cancel(list(uids))))

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """As Executor.poll; returns early when the connection's bell rings."""
        if not self._closed:
            failed = self._ranks.failure is not None
            patience = 0.0 if failed else max(0.0, min(timeout_s, self._patience()))
            messages = self._outputs.receive(patience, self._bell)
            if messages:
                return self._take_in(messages)
        self._check()
        if self._patience() <= 0:
            self._give_up()
        return []

    def start_profile(self, num_steps: int) -> None:
        self._check()
        self._commands.send(encode(StartProfile(num_steps)))

    def take_profile(self) -> Profile | None:
        profile, self._profile = self._profile, None
        return profile

    def close(self) -> None:
        """Stop the ranks and end what was started for them; safe to call twice."""
        self._closed = True
        atexit.unregister(self.close)
        self._open.close()

    def wait(self, wakeup: Wakeup) -> None:
        """Wait for `wakeup`, which must be the connection's: it is also set when a rank fails."""
        wakeup.wait()

    @property
    def locations(self) -> list[RankLocation]:
        return [RankLocation(e.rank, e.host, e.pid) for e in self._ranks.endpoints]

    def _start(self, asked: Config, model: ModelConfig, stack: Undo, connection: Connection) -> None:
        """Bring up the ranks; every step leaves on `stack` what undoes it."""
        if not ray.is_initialized():  # the next call would start Ray anew, in its own way
            raise PlacementError("Ray was shut down in this process; connect to it again")
        if asked.device == "auto" and asked.wait_for_resources is not None and not connection.has_gpus:
            raise ValueError("device='auto' is open while nodes with GPUs may still join; give --device cuda or cpu")
        config = asked.resolved(model, cuda=connection.has_gpus).with_absolute_model()
        self._bell, ip = connection.bell, connection.ip
        with self._phases("placement"):
            group = place(config, connection.leaving, again=connection.has_started)
        stack.callback(while_connected, remove_placement_group, group)
        deadline = time.perf_counter() + config.startup_timeout
        with self._phases("actors"):
            self._ranks = ranks = ActorGroup(config, group, connection.bell, connection.leaving)
            stack.callback(while_connected, ranks.close, STOP_S)
            ranks.endpoints = ranks.call("bind", deadline, ip)
        if ip is None:
            log.info("%s", roster(ranks.endpoints, forwarded()))
        self._outputs = PullSocket(ip or ray.util.get_node_ip_address())
        stack.callback(self._outputs.close)
        loaded: list[Loaded] = ranks.call("load", deadline, ranks.endpoints, self._outputs.address)
        for endpoint, report in zip(ranks.endpoints, loaded, strict=True):
            log.info("%s: %s", endpoint, _describe(report, config))
        log.info("communication: %s", loaded[0].communication)
        self.memory = tightest([report.memory for report in loaded])
        self.limits = plan_limits(asked, config, model, self.memory)
        self._phases.add_slowest(ranks.call("allocate", deadline, self.limits))
        ranks.run()
        connection.has_started = True
        self._commands = PushSocket(ranks.endpoints[0].inbox)
        stack.callback(self._commands.close)
        stack.callback(self._commands.send, encode(Stop()))
        self.startup = self._phases.record()
        log.info("%d ranks %s", len(loaded), summary(self.startup))

    def _take_in(self, messages: list[bytes]) -> list[StepOutput]:
        self._heard = time.perf_counter()
        reports = [decode_report(message) for message in messages]
        self.stats = reports[-1].stats
        self._profile = next((report.profile for report in reports if report.profile is not None), self._profile)
        outputs = [report.output for report in reports]
        self._live.difference_update(finished.uid for output in outputs for finished in output.finished)
        return outputs

    def _check(self) -> None:
        if self._closed:
            raise RankFailed("the ranks were ended by close(); make a new LLM")
        if self._ranks.failure is not None:
            raise self._ranks.failure

    def _patience(self) -> float:
        """Seconds until the ranks count as hung, if nothing comes: a leader that hangs tells nobody."""
        return self._heard + self._patience_s - time.perf_counter() if self._live else math.inf

    def _give_up(self) -> None:
        silence = time.perf_counter() - self._heard
        self._ranks.fail(f"no step has ended for {silence:.0f} s, step_timeout is over: {self._ranks.endpoints[0]}")


def _describe(report: Loaded, config: Config) -> str:
    weights = loading_speed(report.memory.weights, report.loading_s)
    return f"weights {weights}, {config.dtype} on {report.device}"
