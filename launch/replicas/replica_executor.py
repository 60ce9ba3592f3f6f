"""The Executor over replicas: Ray Serve chooses one for each request, and the tokens come back over our own socket.

A request on its way is an attempt with a number of its own: what a replica that counts as lost still sends is known to
be stale by it. Requests whose replica is lost are reported as RequestsLost; the front end has them go on elsewhere.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import ProxyLocation, RequestRouterConfig
from ray.serve.exceptions import RayServeException, ReplicaUnavailableError
from ray.serve.schema import LoggingConfig

from ...runtime.config import Config
from ...runtime.executor import RankLocation, Wakeup
from ...runtime.limits import Limits
from ...runtime.plan import Finished, StepOutput
from ...runtime.request import Request
from ...runtime.stats import EngineStats, Profile
from ..cluster.actor_group import forwarded
from ..cluster.connection import Connection
from ..cluster.sockets import PullSocket
from ..errors import PlacementError, RankFailed, RequestsLost
from ..signals import Undo
from .replica import Replica
from .replica_messages import FrontendInfo, ReplicaReady, StepReport, decode
from .router import PrefixRouter

log = logging.getLogger(__name__)
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 2.0, 30.0
END_S = 10.0  # for a replica to end its ranks
PAGES = 1 << 16  # of each replica's cache that the router remembers
POLL_S = 0.2


class ReplicaExecutor:
    """`replicas` groups of `config.tensor_parallel_size` ranks; ready when the constructor returns."""

    def __init__(self, config: Config, connection: Connection, replicas: int, max_queued: int) -> None:
        config = config.with_absolute_model()
        self._config, self._connection, self._replicas = config, connection, replicas
        self._name = f"lockstep-{uuid.uuid4().hex[:8]}"
        self._numbers = itertools.count()
        self._attempts: dict[int, int] = {}  # number of an attempt -> uid of its request
        self._calls: dict[int, tuple[int, Future[None]]] = {}  # uid -> its attempt, Serve's call
        self._over: deque[tuple[int, str, bool]] = deque()  # attempts that failed, why, whether the replica is lost
        self._hellos: dict[str, ReplicaReady] = {}
        self._stats: dict[str, EngineStats] = {}  # of each replica that there was
        self._free_pages: dict[str, int | None] = {}  # of each replica, after its last step
        self._lifelines: list[socket.socket] = []
        self._loop = asyncio.new_event_loop()
        with Undo() as stack:
            started = time.perf_counter()
            self._start(max_queued, stack)
            self.limits = _common([hello.limits for hello in self._hellos.values()], replicas)
            self.startup = {"replicas": time.perf_counter() - started}
            self._open = stack.pop_all()
        log.info(
            "%d replicas, each of tensor_parallel_size=%d, ready in %.1f s",
            replicas,
            config.tensor_parallel_size,
            *self.startup.values(),
        )

    @property
    def stats(self) -> EngineStats:
        return sum(self._stats.values(), EngineStats())

    @property
    def locations(self) -> list[RankLocation]:
        """All replicas' ranks, numbered from 0."""
        locations = [location for hello in self._hellos.values() for location in hello.locations]
        return [msgspec.structs.replace(location, rank=number) for number, location in enumerate(locations)]

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            attempt = next(self._numbers)
            self._attempts[attempt] = request.uid
            sent = msgspec.structs.replace(request, uid=attempt)
            self._calls[request.uid] = attempt, asyncio.run_coroutine_threadsafe(self._call(sent), self._loop)

    def cancel(self, uids: Sequence[int]) -> None:
        for uid in uids:
            call = self._forget(uid)
            if call is not None:
                call.cancel()

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """As Executor.poll; raises RequestsLost when nothing else has come."""
        messages = self._inbox.receive(0.0 if self._over else timeout_s, self._connection.bell)
        outputs = [output for message in messages if (output := self._take_in(decode(message))) is not None]
        if outputs:
            return outputs
        over = [self._over.popleft() for _ in range(len(self._over))]
        known = [(self._attempts[attempt], why, lost) for attempt, why, lost in over if attempt in self._attempts]
        for uid, _, _ in known:
            self._forget(uid)
        refused = [Finished(uid, "abort", error=why) for uid, why, lost in known if not lost]
        if refused:
            self._over.extendleft(entry for entry in over if entry[2])
            return [StepOutput(finished=refused)]
        if known:
            raise RequestsLost([uid for uid, _, _ in known], known[0][1])
        return []

    def wait(self, wakeup: Wakeup) -> None:
        """Wait for the connection's `wakeup`, or for a message: a new replica takes the place of another."""
        self._inbox.wait(self._connection.bell)

    def start_profile(self, num_steps: int) -> None:
        raise ValueError("a profile is of one group of ranks; start one without replicas")

    def take_profile(self) -> Profile | None:
        return None

    def close(self) -> None:
        """End the application with its replicas; safe to call twice."""
        self._open.close()

    def _start(self, max_queued: int, stack: Undo) -> None:
        ip = self._connection.ip or ray.util.get_node_ip_address()
        self._inbox = PullSocket(ip)
        stack.callback(self._inbox.close)
        lifeline = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self._lifeline = stack.enter_context(lifeline)
        stack.callback(self._end_lifelines)
        threading.Thread(target=self._loop.run_forever, name="lockstep-fleet", daemon=True).start()
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        front = FrontendInfo(self._inbox.address, lifeline.getsockname()[:2], self._connection.ip, forwarded())
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
        stack.callback(self._delete)
        target = serve.RunTarget(
            self._deployment(max_queued).bind(self._config, front), name=self._name, route_prefix=None
        )
        (self._handle,) = serve.run_many([target], wait_for_applications_running=False)
        self._wait_for_replicas()

    def _deployment(self, max_queued: int) -> Any:
        at_once = self._config.max_num_seqs
        return serve.deployment(
            name="Replica",
            num_replicas=self._replicas,
            ray_actor_options={"num_cpus": 0},  # its ranks have bundles of their own
            max_ongoing_requests=at_once,  # a replica's batch: the others wait here, where any replica may take them
            max_queued_requests=max_queued + self._replicas * at_once,  # the server refuses before
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            graceful_shutdown_timeout_s=END_S,
            graceful_shutdown_wait_loop_s=0.5,
            max_constructor_retry_count=1,
            request_router_config=RequestRouterConfig(
                request_router_class=PrefixRouter,
                request_router_kwargs={
                    "page_size": self._config.page_size,
                    "num_pages": self._config.num_pages or PAGES,
                },
            ),
        )(Replica)

    def _wait_for_replicas(self) -> None:
        deadline = time.perf_counter() + self._config.startup_timeout
        while len(self._hellos) < self._replicas:
            for message in self._inbox.receive(POLL_S):
                self._take_in(decode(message))
            status = serve.status().applications.get(self._name)
            if status is not None and status.status == "DEPLOY_FAILED":
                told = [d.message for d in status.deployments.values() if d.message] or [status.message]
                raise PlacementError(f"the replicas do not start: {_cause(told[0])}")
            if self._connection.leaving.is_set():
                raise RankFailed("the start was given up, because the service ends")
            if time.perf_counter() > deadline:
                there = f"{len(self._hellos)} of {self._replicas} replicas"
                raise RankFailed(f"{there} are ready after startup_timeout; raise it, or look at serve status")

    async def _call(self, request: Request) -> None:
        response = self._handle.run.remote(request)
        try:
            await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayActorError, RankFailed, ReplicaUnavailableError) as error:
            self._end_attempt(request.uid, _cause(str(error)), lost=True)
        except RayServeException as error:
            self._end_attempt(request.uid, f"Ray Serve: {_cause(str(error))}", lost=False)

    def _end_attempt(self, attempt: int, why: str, *, lost: bool) -> None:
        self._over.append((attempt, why, lost))
        self._connection.bell.ring()

    def _take_in(self, message: ReplicaReady | StepReport) -> StepOutput | None:
        if isinstance(message, ReplicaReady):
            self._lifelines.append(self._lifeline.accept()[0])
            self._hellos[message.replica] = message
            self._hellos = dict(list(self._hellos.items())[-self._replicas :])
            return None
        self._stats[message.replica] = message.stats
        self._free_pages[message.replica] = message.output.free_pages
        return self._translated(message.output)

    def _translated(self, output: StepOutput) -> StepOutput | None:
        """With the requests' uids in place of the attempts'; without what is stale."""
        own = self._attempts
        pairs = [(own[a], token) for a, token in zip(output.uids, output.tokens, strict=True) if a in own]
        found = StepOutput(
            uids=[uid for uid, _ in pairs],
            tokens=[token for _, token in pairs],
            finished=[msgspec.structs.replace(f, uid=own[f.uid]) for f in output.finished if f.uid in own],
            logprobs={own[a]: value for a, value in output.logprobs.items() if a in own},
            cached_tokens={own[a]: value for a, value in output.cached_tokens.items() if a in own},
            prompt_logprobs={own[a]: value for a, value in output.prompt_logprobs.items() if a in own},
            free_pages=self._num_free_pages(),
        )
        for finished in found.finished:
            self._forget(finished.uid)
        return found if found.uids or found.finished or found.cached_tokens or found.prompt_logprobs else None

    def _num_free_pages(self) -> int:
        """Of all replicas; those that have not made a step yet have all of theirs."""
        known = (self._free_pages.get(replica) for replica in self._hellos)
        return sum(self.limits.num_pages if free is None else free for free in known)

    def _forget(self, uid: int) -> Future[None] | None:
        attempt, call = self._calls.pop(uid, (-1, None))
        self._attempts.pop(attempt, None)
        return call

    def _end_lifelines(self) -> None:
        for lifeline in self._lifelines:
            lifeline.close()

    def _delete(self) -> None:
        if ray.is_initialized():  # else the user's own ray.shutdown() came first
            serve.delete(self._name)


def _common(known: Sequence[Limits], replicas: int) -> Limits:
    """Of one request, what every replica can hold; of requests at once, what all can."""
    return replace(
        known[0],
        max_model_len=min(limits.max_model_len for limits in known),
        num_pages=min(limits.num_pages for limits in known),
        max_num_seqs=replicas * known[0].max_num_seqs,
    )


def _cause(text: str) -> str:
    """The last line that says something, of a traceback or a report."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
