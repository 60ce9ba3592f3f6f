"""The Executor over replicas: the engine's client side, which holds no part of the model.

Ray Serve chooses a replica for each request, and the tokens come back over our own socket. Each submission of a request
is an attempt with its own number, by which late messages of a lost replica are recognized and dropped. Requests of a
lost replica are reported as RequestsLost; the front end submits them to the others.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.schema import LoggingConfig

from ...comm.message_sockets import PullSocket
from ...comm.message_text import counted, last_line
from ...runtime.config import Config
from ...runtime.executor import Wakeup
from ...runtime.limits import Limits
from ...runtime.plan import RequestEnd, StepOutput
from ...runtime.rank_location import RankLocation
from ...runtime.request import Request
from ...runtime.scheduler.waiting_queue import WaitingQueue
from ...runtime.startup_timer import StartupTimer, log_ready
from ...runtime.stats import EngineStats, Profile
from ..cluster.actor_group import forwarded_environment
from ..cluster.connection import Connection
from ..errors import PlacementError, RankFailed, ReplicaFailed, RequestsLost
from ..signals import Undo
from ..standard_streams import WITHOUT_TRACEBACK
from .bounded_call import bounded_call
from .failed_replicas import avoid
from .replica import FrontendInfo, Replica, ReplicaReady, StepReport, decode_report
from .router import PrefixRouter

log = logging.getLogger(__name__)
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
END_S = 10.0  # a replica may take this long to end its ranks
AFFINITY_PAGES = 1 << 16  # the router assumes this cache size of each replica if num_pages is not configured
POLL_S = 0.2
Value = TypeVar("Value")


class ReplicaExecutor:
    """`num_replicas` groups of `config.tensor_parallel_size` ranks; ready when the constructor returns."""

    def __init__(self, config: Config, connection: Connection, num_replicas: int, max_queued: int) -> None:
        self._config, self._connection = config.with_absolute_model(), connection
        self._num_replicas = num_replicas
        self._name = f"lockstep-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._attempts: dict[int, int] = {}  # attempt -> uid of its request
        self._calls: dict[int, tuple[int, Future[None]]] = {}  # uid -> (attempt, Serve's call)
        self._lost: deque[tuple[int, str]] = deque()  # (attempt, reason) after the failure of a replica
        self._refused: deque[tuple[int, str]] = deque()  # (attempt, reason) of Ray Serve's refusal
        # Requests for which no replica has a place.
        self._waiting = WaitingQueue(by_priority=config.scheduling_policy == "priority")
        self._ready: dict[str, ReplicaReady] = {}  # replica -> its report; the latest num_replicas
        self._stats: dict[str, EngineStats] = {}  # replica -> its counters; lost ones included
        self._free_pages: dict[str, int | None] = {}  # replica -> its free pages after its last step
        self._loop = asyncio.new_event_loop()
        timer = StartupTimer()
        with timer("Ray"):
            connection.restore()
        with Undo() as stack:
            with timer("replicas"), connection.naming_loss():
                self._start(max_queued, stack)
            self.limits = self._common_limits()
            self._open = stack.pop_all()
        self.startup = timer.record()
        ranks = counted(config.tensor_parallel_size, "rank")
        log_ready(f"{counted(num_replicas, 'replica')} of {ranks}", self.startup)

    @property
    def stats(self) -> EngineStats:
        return sum(self._stats.values(), EngineStats())

    @property
    def locations(self) -> list[RankLocation]:
        """The ranks of all replicas, numbered from 0."""
        locations = [location for ready in self._ready.values() for location in ready.locations]
        return [msgspec.structs.replace(location, rank=number) for number, location in enumerate(locations)]

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._waiting.add(request)
        self._call_waiting()

    def cancel(self, uids: Sequence[int]) -> None:
        for uid in uids:
            self._waiting.remove(uid)
            call = self._forget(uid)
            if call is not None:
                call.cancel()
        self._call_waiting()

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """Do as Executor.poll; raise RequestsLost if requests have lost their replica and no outputs have come."""
        messages = self._inbox.receive(0.0 if self._lost or self._refused else timeout_s, self._connection.wakeup)
        outputs = [output for message in messages if (output := self._update(decode_report(message))) is not None]
        if outputs:
            return outputs
        if self._connection.failure is not None or (self._lost and self._connection.is_lost()):
            self._connection.check()
        refused = [RequestEnd(uid, "abort", error=reason) for uid, reason in self._take(self._refused)]
        if refused:
            self._call_waiting()
            return [StepOutput(finished=refused)]
        lost = self._take(self._lost)
        if lost:
            raise RequestsLost([uid for uid, _ in lost], lost[0][1])
        return []

    def wait(self, wakeup: Wakeup) -> None:
        """Wait for the connection's `wakeup`, or for a message: a new replica takes the place of another."""
        self._inbox.wait(self._connection.wakeup)

    def start_profile(self, num_steps: int) -> None:
        raise ValueError("a profile needs a single group of ranks; start without replicas")

    def take_profile(self) -> Profile | None:
        return None

    def close(self) -> None:
        """End the application with its replicas; safe to call twice."""
        self._open.close()

    def _start(self, max_queued: int, stack: Undo) -> None:
        ip = self._connection.ip or ray.util.get_node_ip_address()
        self._inbox = PullSocket(ip)
        stack.callback(self._inbox.close)
        threading.Thread(target=self._loop.run_forever, name="lockstep-replica-calls", daemon=True).start()
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        frontend = FrontendInfo(self._inbox.address, self._connection.ip, forwarded_environment())
        serve_log = logging.getLogger("ray.serve")
        serve_log.setLevel(logging.WARNING)
        serve_log.addFilter(WITHOUT_TRACEBACK)  # a loss of Ray has one for each stream
        serve_log.addFilter(_reports_no_dead_replica)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.context._set_global_client(None)  # after a loss of Ray it is that of another cluster
        deadline = time.perf_counter() + self._config.startup_timeout
        start = partial(serve.start, proxy_location=ProxyLocation.Disabled, logging_config=quiet)
        bounded_call("start of Ray Serve", start, deadline, self._connection.check)
        stack.callback(self._connection.while_usable, serve.delete, self._name)
        replicas = self._deployment(max_queued).bind(self._config, frontend)
        target = serve.RunTarget(replicas, name=self._name, route_prefix=None)
        run = partial(serve.run_many, [target], wait_for_applications_running=False)
        (self._handle,) = bounded_call("start of the replicas", run, deadline, self._connection.check)
        self._wait_for_replicas(deadline)

    def _deployment(self, max_queued: int) -> Any:
        batch_size = self._config.max_num_seqs
        cache = {"page_size": self._config.page_size, "num_pages": self._config.num_pages or AFFINITY_PAGES}
        return serve.deployment(
            name="Replica",
            num_replicas=self._num_replicas,
            ray_actor_options={"num_cpus": 0},  # its ranks have their own bundles
            max_ongoing_requests=batch_size,  # other requests wait in the front end for any replica
            max_queued_requests=max_queued + self._num_replicas * batch_size,  # the server refuses earlier
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            graceful_shutdown_timeout_s=END_S,
            graceful_shutdown_wait_loop_s=0.5,
            max_constructor_retry_count=1,
            request_router_config=RequestRouterConfig(request_router_class=PrefixRouter, request_router_kwargs=cache),
        )(Replica)

    def _wait_for_replicas(self, deadline: float) -> None:
        while len(self._ready) < self._num_replicas:
            for message in self._inbox.receive(POLL_S):
                self._update(decode_report(message))
            statuses = bounded_call("status of the replicas", serve.status, deadline, self._connection.check)
            status = statuses.applications.get(self._name)
            if status is not None and status.status == "DEPLOY_FAILED":
                reports = [d.message for d in status.deployments.values() if d.message] or [status.message]
                raise PlacementError(f"the replicas do not start: {last_line(reports[0])}")
            self._connection.check()
            if time.perf_counter() > deadline:
                progress = f"{len(self._ready)} of {self._num_replicas} replicas"
                raise RankFailed(f"{progress} are ready after startup_timeout; raise it, or look at serve status")

    async def _call(self, request: Request) -> None:
        response = self._handle.run.remote(request)
        try:
            await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayActorError, ReplicaFailed, ReplicaUnavailableError) as error:
            if isinstance(error, ReplicaFailed):
                avoid(error.replica)
            cause = error.cause if isinstance(error, RayTaskError) else error  # what the replica has raised
            self._lost.append((request.uid, last_line(str(cause))))
            self._connection.wakeup.set()
        except RayServeException as error:
            self._refused.append((request.uid, f"Ray Serve: {last_line(str(error))}"))
            self._connection.wakeup.set()

    def _call_waiting(self) -> None:
        """Hand waiting requests to Serve, in their order, while the replicas have places for them."""
        while len(self._waiting) > 0 and len(self._calls) < self.limits.max_num_seqs:
            request = self._waiting.head()
            assert request is not None, "nothing blocks this queue"
            self._waiting.pop(request.client)
            attempt = next(self._numbers)
            self._attempts[attempt] = request.uid
            numbered = msgspec.structs.replace(request, uid=attempt)
            self._calls[request.uid] = attempt, asyncio.run_coroutine_threadsafe(self._call(numbered), self._loop)

    def _take(self, attempts: deque[tuple[int, str]]) -> list[tuple[int, str]]:
        """Empty a queue of attempts; return the uid and the reason for those of live requests."""
        taken = [attempts.popleft() for _ in range(len(attempts))]
        current = [(self._attempts[number], reason) for number, reason in taken if number in self._attempts]
        for uid, _ in current:
            self._forget(uid)
        return current

    def _update(self, message: ReplicaReady | StepReport) -> StepOutput | None:
        """Take a message of a replica; return the output that it has for current attempts."""
        if isinstance(message, ReplicaReady):
            self._ready[message.replica] = message
            self._ready = dict(list(self._ready.items())[-self._num_replicas :])
            return None
        self._stats[message.replica] = message.stats
        self._free_pages[message.replica] = message.output.free_pages
        return self._translate(message.output)

    def _translate(self, output: StepOutput) -> StepOutput | None:
        """Return the output with the requests' uids in place of the attempts' numbers, None if nothing is left."""
        uids = self._attempts

        def by_uid(values: dict[int, Value]) -> dict[int, Value]:
            return {uids[attempt]: value for attempt, value in values.items() if attempt in uids}

        translated = StepOutput(
            uids=[uids[attempt] for attempt in output.uids if attempt in uids],
            tokens=[token for attempt, token in zip(output.uids, output.tokens, strict=True) if attempt in uids],
            finished=[msgspec.structs.replace(f, uid=uids[f.uid]) for f in output.finished if f.uid in uids],
            logprobs=by_uid(output.logprobs),
            cached_tokens=by_uid(output.cached_tokens),
            prompt_logprobs=by_uid(output.prompt_logprobs),
            free_pages=self._num_free_pages(),
            num_computed=output.num_computed,
            prefill_s=by_uid(output.prefill_s),
        )
        for finished in translated.finished:
            self._forget(finished.uid)
        self._call_waiting()
        t = translated
        return t if t.uids or t.finished or t.cached_tokens or t.prompt_logprobs or t.num_computed else None

    def _num_free_pages(self) -> int:
        """Return the free pages of all replicas; before its first step a replica has all of its pages."""
        reports = (self._free_pages.get(replica) for replica in self._ready)
        return sum(self.limits.num_pages if free is None else free for free in reports)

    def _common_limits(self) -> Limits:
        """Return the limits for a request in any replica, and for the number of requests in all of them."""
        limits = [ready.limits for ready in self._ready.values()]
        return replace(
            limits[0],
            max_model_len=min(each.max_model_len for each in limits),
            num_pages=min(each.num_pages for each in limits),
            max_num_seqs=self._num_replicas * limits[0].max_num_seqs,
        )

    def _forget(self, uid: int) -> Future[None] | None:
        attempt, call = self._calls.pop(uid, (-1, None))
        self._attempts.pop(attempt, None)
        return call


def _reports_no_dead_replica(record: logging.LogRecord) -> bool:
    """Return False for Serve's report of a dead replica, which comes once for each stream; `poll` reports it, too."""
    return "will not be considered for future requests" not in record.getMessage()
