"""The engine for asyncio: a model that serves requests, survives failures of its ranks and can be drained.

asyncio tasks --commands--> EngineThread: RecoveringEngine over an Executor --events, one batch a step--> tasks
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from ...comm.message_sockets import WakeupEvent
from ...runtime.config import DEMO_MODEL, DEMO_NAME, Config
from ...runtime.frontend import Frontend
from ...runtime.generation import Generation
from ...runtime.limits import Limits
from ...runtime.model.checkpoint import find_model
from ...runtime.model.generation_config import default_sampling_params
from ...runtime.outputs import Event
from ...runtime.request import NO_ORIGIN, Origin, PromptFields
from ...runtime.sampling.grammar import Vocabulary
from ...runtime.sampling_params import SamplingParams
from ...runtime.startup_timer import count_from_here
from ...runtime.structured_outputs import StructuredOutputsParams
from ...runtime.tokenizer import Tokenizer
from ..cluster.engine_thread import EngineThread
from ..errors import EngineFailed, RequestCrashedEngine
from ..executor_choice import connect_ray, start_server_executor
from ..signals import Undo
from .async_tokenizer import AsyncTokenizer
from .engine_state import AsyncEngineStats, Health
from .event_streams import EventSink, OutputQueue
from .grammar_check import GrammarCheck
from .recovery import CLOSING, RecoveringEngine


class AsyncEngine:
    """A model for asyncio tasks: `start` it, `generate`, and always `close` it.

    Ranks that fail are started again, up to max_restarts times within restart_window seconds. With several replicas
    Ray Serve replaces a failed one without a limit; up to max_queued requests wait for a place in any of them.
    A `chat_template` takes the place of the checkpoint's.
    """

    def __init__(
        self,
        config: Config,
        *,
        max_restarts: int = 3,
        restart_window: float = 600.0,
        replicas: int = 1,
        max_queued: int = 1024,
        chat_template: str | None = None,
    ) -> None:
        self.config = config
        self.name = DEMO_NAME if config.model == DEMO_MODEL else config.model
        self._max_restarts, self._restart_window = max_restarts, restart_window
        self._replicas, self._max_queued = replicas, max_queued
        self.chat_template = chat_template
        self._closing_since = 0.0  # time.time at the first `close`; 0 before
        self._active: set[asyncio.Future[None]] = set()  # one for each generation in progress
        self._thread: EngineThread | None = None

    @count_from_here()
    def start(self) -> None:
        """Load the model and start the ranks; blocks until requests can run. Raises the errors of LLM.

        For one call; another one, or one after `close`, raises EngineFailed.
        """
        if self._closing_since or self._thread is not None:
            raise EngineFailed("an engine starts once; make a new AsyncEngine")
        folder, model = find_model(self.config)
        self.folder = folder
        tokenizer = Tokenizer(folder, self.chat_template)
        self.tokenizer = AsyncTokenizer(tokenizer)
        self.default_params = default_sampling_params(folder, self.config.generation_config)
        self._grammars = GrammarCheck(Vocabulary(folder, model.vocab_size, model.eos_token_ids))
        with Undo() as stack:
            stack.callback(self.tokenizer.close)
            stack.callback(self._grammars.close)
            connection = connect_ray(self.config, self._replicas)
            if connection is None:
                wakeup, shutting_down = WakeupEvent(), threading.Event()
                stack.callback(wakeup.close)
            else:
                wakeup, shutting_down = connection.wakeup, connection.shutting_down
                stack.callback(connection.close)
            choices = self._replicas, self._max_queued
            start_ranks = partial(start_server_executor, self.config, model, folder, connection, wakeup, *choices)
            frontend = Frontend(start_ranks(), tokenizer, model.eos_token_ids)
            limits = self._max_restarts, self._restart_window
            self._engine = RecoveringEngine(frontend, start_ranks, stack.pop_all(), *limits)
        self._thread = EngineThread(self._engine, "lockstep-engine", wakeup, shutting_down)
        self._thread.start()
        atexit.register(self._stop)

    @property
    def health(self) -> Health:
        """The state after `start`."""
        health = self._engine.health
        if self._closing_since and health.state == "ready":
            return replace(health, state="draining", reason=CLOSING, since=self._closing_since)
        return health

    @property
    def limits(self) -> Limits:
        """The limits that every request must keep."""
        return self._engine.frontend.executor.limits

    @property
    def num_waiting(self) -> int:
        """The number of live outputs that the ranks have not started."""
        return sum(not output.running for output in self._engine.frontend.live)

    def stats(self) -> AsyncEngineStats:
        """Return a reading of the state after `start`, without waiting for anything."""
        frontend = self._engine.frontend
        live = frontend.live
        running = [output for output in live if output.running]
        lengths = (len(output.generation.prompt_ids) + output.num_tokens for output in running)
        pages = sum(-(-length // self.limits.page_size) for length in lengths)
        total, free = self._replicas * self.limits.num_pages, frontend.num_free_pages
        return AsyncEngineStats(
            num_live=len(live),
            running=len(running),
            waiting=len(live) - len(running),
            kv_usage=min(1.0, pages / total),
            free_pages=total if free is None else free,
            prefix_hits=frontend.num_prefix_hits,
            prefix_queries=frontend.num_prefix_queries,
            engine=self._engine.stats,
            distributions=frontend.distributions,
            restarts=self._engine.health.restarts,
            ranks=frontend.executor.locations,
            events=list(self._engine.events),
        )

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint of outputs in the process for it; raises RequestRefused if it cannot be used."""
        self._check()
        await self._grammars.check(params)

    async def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of a prompt of token ids until its n outputs have ended; closing it cancels the rest.

        Raises RequestRefused before anything starts, RequestCrashedEngine if this request crashes the engine
        repeatedly, and EngineFailed if the ranks have failed for good. It pauses while the ranks restart.
        """
        with self.in_progress():
            generation, queue = await self.prepare(prompt, params, origin), OutputQueue()
            num_unfinished = params.n
            self.submit(generation, queue)
            try:
                while num_unfinished > 0:
                    for event in await queue.get():
                        num_unfinished -= event.finished
                        yield event
            finally:
                if num_unfinished > 0:
                    self.cancel(generation)

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        """Let `close` wait until the block has ended, before and after a generation is submitted."""
        ended = asyncio.get_running_loop().create_future()
        self._active.add(ended)
        try:
            yield
        finally:
            self._active.discard(ended)
            ended.set_result(None)

    async def prepare(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> Generation:
        """Return a generation for `submit`; raises as `generate` does before anything starts."""
        self._check()
        if params.structured_outputs is not None:
            await self._grammars.check(params.structured_outputs)
            self._check()
        generation = self._engine.frontend.prepare(prompt, params, origin)
        if self._engine.quarantine.refuses(generation):
            raise RequestCrashedEngine("this request recently crashed the engine and is quarantined")
        return generation

    def submit(self, generation: Generation, sink: EventSink) -> None:
        """Start a prepared generation, whose events `sink` receives; for a task of the sink's loop."""
        assert self._thread is not None
        self._thread.post_with_others(partial(self._engine.submit, generation, sink), sink.loop)

    def cancel(self, generation: Generation) -> None:
        """End a generation that was submitted; its sink receives nothing any more."""
        assert self._thread is not None
        self._thread.post(partial(self._engine.cancel, generation))

    async def close(self, drain_timeout: float = 0.0) -> None:
        """Refuse new requests, give live ones drain_timeout seconds, abort the rest, and end the ranks.

        Safe to call twice; the ranks have ended when this returns.
        """
        self._closing_since = self._closing_since or time.time()
        if self._active:
            await asyncio.wait(self._active, timeout=drain_timeout)
        if self._thread is not None:
            await asyncio.to_thread(self._stop)

    def _check(self) -> None:
        """Raise EngineFailed if a request cannot be submitted, now or after the ranks have been started again."""
        if self._closing_since:
            raise EngineFailed(f"{CLOSING}; no new requests")
        if self._thread is None:
            raise EngineFailed("the engine has not been started; call start() first")
        if self._engine.health.state == "failed":
            raise EngineFailed(self._engine.health.reason)

    def _stop(self) -> None:
        assert self._thread is not None
        atexit.unregister(self._stop)
        self._thread.stop()
