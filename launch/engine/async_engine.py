"""An engine for asyncio that survives the death of its ranks.

    asyncio tasks --commands--> one thread: Frontend over an Executor --events, one batch a step--> asyncio tasks

The thread owns the front end and its executor; nobody else touches them. When the executor fails, the thread closes it,
starts another one and admits what the ledger holds: the tasks that wait for events see a pause, and nothing else.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from ...runtime.checkpoint import find_model
from ...runtime.config import Config
from ...runtime.executor import Executor, Wakeup
from ...runtime.frontend import Frontend, Generation, Output
from ...runtime.limits import Limits
from ...runtime.outputs import Event
from ...runtime.plan import StepOutput
from ...runtime.request import Request, SamplingParams
from ...runtime.sampling.grammar import Vocabulary
from ...runtime.stats import EngineStats, Profile
from ...runtime.tokenizer import Tokenizer, default_sampling_params
from ..cluster.sockets import WakeupEvent
from ..errors import EngineFailed, PlacementError, RankFailed, RequestCrashedEngine, RequestsLost
from ..executors import connect_ray, start_executor, start_replicas
from ..signals import Undo
from .async_tokenizer import AsyncTokenizer
from .grammar_check import GrammarCheck
from .quarantine import CrashQuarantine

if TYPE_CHECKING:
    from ..cluster.connection import Connection

log = logging.getLogger(__name__)
WAIT_S = 60.0  # for a step; the bell and the executor's own deadline come before
ENDS = "the service ends"


@dataclass(frozen=True)
class Health:
    """Whether requests are served, and if not why."""

    state: Literal["starting", "ready", "recovering", "draining", "failed"]
    reason: str = ""
    since: float = field(default_factory=time.time)  # of time.time
    restarts: int = 0  # of the ranks, so far


class RankStatus(NamedTuple):
    """Where a rank runs; those that run in this process have its pid."""

    rank: int
    host: str
    pid: int
    state: Literal["running", "ended"]


class AsyncEngineStats(msgspec.Struct, frozen=True):
    """What the service tells of itself, as seen from the front end; `engine` and the cache's counters only grow."""

    num_live: int  # outputs that have not ended
    running: int  # of these, those that the ranks have begun with
    waiting: int
    kv_usage: float  # 0 to 1: pages of the running outputs; those that outputs share count for each
    free_pages: int  # of the KV cache, by the scheduler's own account after its last step
    prefix_hits: int  # tokens found in the prefix cache, of
    prefix_queries: int  # so many that were looked for
    engine: EngineStats  # of all ranks since the start, restarted ones included
    restarts: int
    ranks: list[RankStatus]


class NullExecutor:
    """In an executor's place while there are no ranks: what is submitted stays in the ledger, and nothing comes."""

    def __init__(self, previous: Executor) -> None:
        self.limits, self.locations = previous.limits, previous.locations
        self.startup: dict[str, float] = {}
        self.stats = EngineStats()

    def submit(self, requests: Sequence[Request]) -> None: ...

    def cancel(self, uids: Sequence[int]) -> None: ...

    def poll(self, timeout_s: float) -> list[StepOutput]:
        return []

    def wait(self, wakeup: Wakeup) -> None:
        wakeup.wait()

    def start_profile(self, num_steps: int) -> None: ...

    def take_profile(self) -> Profile | None:
        return None

    def close(self) -> None: ...


class OutputQueue:
    """The task that waits for a generation's events, on the loop where it was made.

    What comes while it is busy is joined: who cannot keep up with the ranks gets fewer events, of more tokens each.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.loop = asyncio.get_running_loop()
        self._news: dict[int, Event] = {}  # of each output, since the task has looked
        self._failure: EngineFailed | None = None
        self._came = asyncio.Event()

    def put(self, news: Event | EngineFailed) -> None:
        """Called on the loop."""
        if isinstance(news, EngineFailed):
            self._failure = news
        else:
            before = self._news.get(news.index)
            self._news[news.index] = news if before is None else before.joined(news)
        self._came.set()

    async def get(self) -> list[Event]:
        """At most one event of each output; raises the EngineFailed that came after all of them."""
        await self._came.wait()
        news, self._news = list(self._news.values()), {}
        if self._failure is None:
            self._came.clear()
        elif not news:
            raise self._failure
        return news


class AsyncEngine:
    """A model that serves requests from asyncio: `start` it, `generate`, and `close` it in any case.

    Ranks that fail are started again, up to max_restarts times within restart_window seconds. With several replicas Ray
    Serve does that, as often as it takes; max_queued requests wait for a place in one of them.
    """

    def __init__(
        self,
        config: Config,
        *,
        max_restarts: int = 3,
        restart_window: float = 600.0,
        replicas: int = 1,
        max_queued: int = 1024,
    ) -> None:
        self.config = config
        self._replicas, self._max_queued = replicas, max_queued
        self.name = config.model
        self._max_restarts, self._restart_window = max_restarts, restart_window
        self._health = Health("starting")  # the thread's view; closing is the tasks' business
        self._closing_since = 0.0
        self._commands: deque[Callable[[], None]] = deque()  # for the thread
        self._listeners: dict[int, OutputQueue] = {}  # the thread's, by generation
        self._active: set[asyncio.Future[None]] = set()  # one for each `generate` in progress
        self._failures: list[float] = []  # within the window, of time.monotonic
        self._suspects = CrashQuarantine(restart_window)  # the thread's; tasks only ask whether it knows a request
        self._before = EngineStats()  # counters of the executors that are gone
        self._thread = threading.Thread(target=self._run, name="lockstep-service", daemon=True)

    # -- what asyncio's side calls

    def start(self) -> None:
        """Load the model and start the ranks; blocks until requests can run. Raises what LLM raises."""
        self._folder, self._model = find_model(self.config)
        tokenizer = Tokenizer(self._folder)
        self.default_params = default_sampling_params(self._folder)
        self._grammars = GrammarCheck(Vocabulary(self._folder, self._model.vocab_size, self._model.eos_token_ids))
        self.tokenizer = AsyncTokenizer(tokenizer)
        with Undo() as stack:
            self._connection: Connection | None = connect_ray(self.config, self._replicas)
            if self._connection is not None:
                stack.callback(self._connection.close)
            self._bell = self._connection.bell if self._connection is not None else WakeupEvent()
            self._leaving = self._connection.leaving if self._connection is not None else threading.Event()
            stack.callback(self._bell.close)
            stack.callback(self._grammars.close)
            self._frontend = Frontend(self._start_executor(), tokenizer, self._model.eos_token_ids)
            self._open = stack.pop_all()
        self._set_health("ready")
        self._thread.start()
        atexit.register(self._leave)

    @property
    def health(self) -> Health:
        health = self._health
        if self._closing_since and health.state == "ready":
            return replace(health, state="draining", reason=ENDS, since=self._closing_since)
        return health

    @property
    def limits(self) -> Limits:
        """What every request must keep to."""
        return self._frontend.executor.limits

    def stats(self) -> AsyncEngineStats:
        """The state of things, without waiting for anything; only after `start`."""
        live = self._frontend.live
        running = [stream for stream in live if stream.running]
        lengths = (len(s.owner.prompt_ids) + len(s.output.token_ids) for s in running)
        pages = sum(-(-length // self.limits.page_size) for length in lengths)
        total, free = self._replicas * self.limits.num_pages, self._frontend.num_free_pages
        state: Literal["running", "ended"] = "running" if self._health.state == "ready" else "ended"
        return AsyncEngineStats(
            num_live=len(live),
            running=len(running),
            waiting=len(live) - len(running),
            kv_usage=min(1.0, pages / total),
            free_pages=total if free is None else free,
            prefix_hits=self._frontend.num_cached_tokens,
            prefix_queries=self._frontend.num_looked_up,
            engine=self._before + self._frontend.executor.stats,
            restarts=self._health.restarts,
            ranks=[RankStatus(r.rank, r.host, r.pid, state) for r in self._frontend.executor.locations],
        )

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[Event, None]:
        """Yield the events of a prompt of token ids until its n outputs have ended; leaving early cancels the rest.

        Raises RequestRefused before anything starts, RequestCrashedEngine if this request ended the ranks
        each time, and EngineFailed if the ranks are gone for good. While they are started again, it pauses.
        """
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        self._active.add(ended)
        try:
            self._check()
            if params.structured_outputs is not None:
                await self._grammars.check(params.structured_outputs)
                self._check()
            generation = self._frontend.prepare(prompt, params)
            if self._suspects.knows(generation):
                raise RequestCrashedEngine(
                    "this request has ended its ranks every time, not long ago; it is not tried again"
                )
            listener = OutputQueue(generation)
            self._post(partial(self._admit, listener))
            left = params.n
            try:
                while left > 0:
                    for event in await listener.get():
                        left -= event.finish_reason is not None
                        yield event
            finally:
                if left > 0:
                    self._post(partial(self._cancel, listener))
        finally:
            self._active.discard(ended)
            ended.set_result(None)

    async def close(self, drain_timeout: float = 0.0) -> None:
        """Admit nothing more, give live requests drain_timeout seconds, end the rest with "abort", and the ranks.

        Safe to call twice; the ranks have been ended when this returns.
        """
        self._closing_since = self._closing_since or time.time()
        if self._active:
            await asyncio.wait(self._active, timeout=drain_timeout)
        if self._thread.is_alive():
            await asyncio.to_thread(self._leave)

    def _check(self) -> None:
        """Raises EngineFailed if a request cannot be admitted, now or after the ranks have come back."""
        if self._closing_since:
            raise EngineFailed(f"{ENDS}; no new requests")
        if self._health.state == "failed":
            raise EngineFailed(self._health.reason)

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._bell.ring()

    def _leave(self) -> None:
        """Let the thread end, and wait for it."""
        atexit.unregister(self._leave)
        self._leaving.set()
        self._bell.ring()
        self._thread.join()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                try:
                    self._work()
                except RequestsLost as lost:
                    self._move(lost)
                except RankFailed as error:
                    said = f"\nthe last it wrote:\n{error.last_words}" if error.last_words else ""
                    log.error("%s%s", error, said)
                    self._lose(str(error))
                except Exception as error:  # one rank in this process: whatever its step raises
                    log.exception("the engine failed")
                    self._lose(f"{type(error).__name__}: {error}")
        finally:
            self._end()

    def _work(self) -> None:
        """One turn: take in commands, take in a step, or wait for either."""
        if self._health.state == "recovering":
            self._recover()
        self._take_commands()
        self._try_suspects()
        self._deliver(self._frontend.poll(WAIT_S if self._listeners else 0.0))
        if not self._listeners:
            self._frontend.executor.wait(self._bell)
        self._bell.clear()  # who rings first leaves his message: the next turn finds it

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _admit(self, listener: OutputQueue) -> None:
        if self._health.state == "failed":
            self._send([(listener, EngineFailed(self._health.reason))])
        else:
            self._listeners[listener.generation.number] = listener
            self._frontend.submit([listener.generation], later=self._suspects.hold(listener.generation))

    def _cancel(self, listener: OutputQueue) -> None:
        self._listeners.pop(listener.generation.number, None)
        self._frontend.cancel([listener.generation])

    def _deliver(self, changed: Iterable[Output]) -> None:
        """Hand out what is new of these outputs, to those who still listen."""
        told = [(stream, self._listeners.get(stream.owner.number)) for stream in changed]
        self._send((listener, stream.take_event()) for stream, listener in told if listener is not None)
        for stream, _ in told:
            if stream.owner.finished:
                self._listeners.pop(stream.owner.number, None)

    def _send(self, events: Iterable[tuple[OutputQueue, Event | EngineFailed]]) -> None:
        """One wake-up for each loop, whatever the number of events."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputQueue, Event | EngineFailed]]] = {}
        for listener, event in events:
            by_loop.setdefault(listener.loop, []).append((listener, event))
        for loop, batch in by_loop.items():
            with suppress(RuntimeError):  # the loop was closed, and its tasks are gone
                loop.call_soon_threadsafe(_put, batch)

    # -- failure and recovery, in the thread

    def _lose(self, reason: str) -> None:
        """The ranks are gone: they will be started again in the next turn, unless that happens too often."""
        executor = self._detach()
        now = time.monotonic()
        recent = [then for then in self._failures if now - then < self._restart_window]
        if not isinstance(executor, NullExecutor):  # they had requests
            recent = self._accuse(reason, recent)
        self._failures = [*recent, now]
        if len(recent) < self._max_restarts:
            self._set_health("recovering", reason)
        else:
            self._fail(f"{reason}; given up after {len(recent)} restarts within {self._restart_window:g} s")
        self._end_ranks(executor)

    def _accuse(self, reason: str, recent: list[float]) -> list[float]:
        """End the request that has caused this failure, if one has: then its failures count as one."""
        deaths = self._end_guilty(reason, self._frontend.generations)
        return recent[: len(recent) - (deaths - 1)] if deaths else recent

    def _end_guilty(self, reason: str, live: list[Generation]) -> int:
        """Of these, which were live when ranks died, end the one that has caused it; its deaths, 0 if none is known."""
        found = self._suspects.died(live)
        if found is None:
            return 0
        guilty, deaths = found
        why = f"this request has ended its ranks {deaths} times, the last time as the only suspect: {reason}"
        same = [g for g in self._frontend.generations if g is guilty or self._suspects.knows(g)]
        log.error("request %d ends, %d like it: %s", guilty.number, len(same) - 1, why)
        self._frontend.cancel(same, why)
        told = [self._listeners.pop(g.number, None) for g in same]
        self._send((listener, RequestCrashedEngine(why)) for listener in told if listener is not None)
        return deaths

    def _move(self, lost: RequestsLost) -> None:
        """A replica has failed: its requests go on in others, with what they have produced."""
        moved = self._frontend.withdraw(lost.uids)
        log.error("a replica has failed, %d requests go on elsewhere: %s", len(moved), lost)
        idle = [*moved, *self._suspects.resting]
        self._end_guilty(str(lost), moved)
        resting = self._suspects.resting
        for generation in idle:
            if generation not in resting and not generation.finished:
                self._frontend.resume(generation)

    def _try_suspects(self) -> None:
        """Let the next one that is under suspicion go on, when the one before has been cleared."""
        rest, go_on = self._suspects.step()
        if rest:  # a message to the ranks
            self._frontend.withdraw(s.request.uid for g in rest for s in g.sequences)
        for generation in go_on:
            self._frontend.resume(generation)

    def _recover(self) -> None:
        """Start the ranks again, and admit what is in the ledger."""
        started = time.perf_counter()
        self._health = replace(self._health, restarts=self._health.restarts + 1)
        gc.unfreeze()  # the runner froze what there was, itself included, if it was in this process
        gc.collect()
        try:
            executor = self._start_executor()
        except (PlacementError, ValueError, OSError) as error:  # trying again would not help
            self._fail(f"the ranks cannot be started again: {error}; before, {self._health.reason}")
            return
        suspects = self._suspects.waiting
        if suspects:
            log.warning(
                "%d requests were live in two failures and came no further: they are tried one by one", len(suspects)
            )
        self._frontend.resubmit(executor, self._suspects.resting)
        self._set_health("ready")
        log.info("back after %.1f s: %d outputs go on", time.perf_counter() - started, len(self._frontend.live))

    def _start_executor(self) -> Executor:
        if self._replicas > 1:
            assert self._connection is not None
            return start_replicas(self.config, self._connection, self._replicas, self._max_queued)
        return start_executor(self.config, self._model, self._folder, self._connection)

    def _fail(self, reason: str) -> None:
        """For good: everybody who waits hears of it, and so will everybody who comes."""
        log.error("%s", reason)
        self._set_health("failed", reason)
        listeners = list(self._listeners.values())
        self._listeners.clear()
        self._frontend.cancel([listener.generation for listener in listeners], reason)
        self._send((listener, EngineFailed(reason)) for listener in listeners)

    def _detach(self) -> Executor:
        """Take the executor, to close it; what comes from now on stays in the ledger."""
        executor = self._frontend.executor
        self._frontend.executor = NullExecutor(executor)
        self._before += executor.stats
        return executor

    def _end_ranks(self, executor: Executor) -> None:
        try:
            executor.close()
        except Exception:  # of Ray, where more than the ranks is broken
            log.exception("the ranks did not end in order")

    def _end(self) -> None:
        """Tell those who still listen, and leave nothing behind."""
        executor = self._detach()
        self._take_commands()
        live = self._frontend.live
        self._frontend.cancel([listener.generation for listener in self._listeners.values()], ENDS)
        self._deliver(live)
        self._end_ranks(executor)
        self._open.close()

    def _set_health(self, state: Literal["ready", "recovering", "failed"], reason: str = "") -> None:
        self._health = Health(state, reason, restarts=self._health.restarts)


def _put(batch: list[tuple[OutputQueue, Event | EngineFailed]]) -> None:
    for listener, event in batch:
        listener.put(event)
