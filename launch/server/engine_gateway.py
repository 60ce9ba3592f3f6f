"""The engine's side of the link to one API server process: executes its commands, and sends it events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from ...runtime.generation import Generation
from ...runtime.outputs import Event
from ...runtime.request import PromptFields
from ..errors import EngineFailed
from . import api_server_messages as messages
from .api_errors import ApiError
from .api_server_messages import decode_command, encode
from .local_client import LocalEngineClient
from .request_metrics import RequestMetrics

log = logging.getLogger(__name__)
PART_CANDIDATES = 2000  # of log-probabilities in a message, which takes 1 ms


class ForwardedStream:
    """The EventSink of a Generate; `ended` is done after the last event, or has the engine's failure.

    is_held  events wait for `release`; then `begun` is done after the first event of the first output
    """

    def __init__(
        self, call: int, num_outputs: int, add: Callable[[messages.StreamEvent], None], *, is_held: bool
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.begun: asyncio.Future[None] = self.loop.create_future()
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self._call, self._num_unfinished, self._add = call, num_outputs, add
        self._held: list[Event] | None = [] if is_held else None

    def put(self, item: Event | EngineFailed) -> None:
        """Forward an event, or end with a failure."""
        if self.ended.done():  # cancelled
            return
        if isinstance(item, EngineFailed):
            self.ended.set_exception(item)
        elif self._held is not None:
            self._held.append(item)
        else:
            self._forward(item)
        if not self.begun.done() and (isinstance(item, EngineFailed) or item.index == 0):
            self.begun.set_result(None)

    def release(self) -> None:
        """Forward the events that wait, and later ones at once."""
        held, self._held = self._held or (), None
        for event in held:
            self._forward(event)

    def _forward(self, event: Event) -> None:
        self._add(messages.StreamEvent.of(self._call, event))
        self._num_unfinished -= event.finished
        if self._num_unfinished == 0:
            self.ended.set_result(None)


class EngineGateway:
    """Executes the commands of one API server; `send` carries its messages there.

    all_metrics  returns the metrics of the requests of all API servers
    """

    def __init__(
        self,
        client: LocalEngineClient,
        all_metrics: Callable[[], Awaitable[RequestMetrics]],
        send: Callable[[bytes], None],
    ) -> None:
        self.metrics = RequestMetrics()  # the last ones received
        self.num_closed = 0  # connections that have ended
        self.silent_s = 0  # seconds without a message, counted by `tick`
        self._client, self._all_metrics, self._send_bytes = client, all_metrics, send
        self._admitted: dict[int, ExitStack] = {}  # by the call of the Admit
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by call
        self._events: list[messages.StreamEvent] = []  # not sent yet
        self._metrics_wait: asyncio.Future[None] | None = None

    def receive(self, message: bytes) -> None:
        """Execute a command."""
        self.silent_s = 0
        match decode_command(message):
            case messages.Admit() as command:
                self._admit(command)
            case messages.Release(call):
                if (stack := self._admitted.pop(call, None)) is not None:
                    stack.close()
            case messages.Generate() as command:
                self._start(command.call, self._generate(command))
            case messages.CancelStream(call):
                if (task := self._tasks.get(call)) is not None:
                    task.cancel()
            case messages.CheckGrammar(call, params):
                self._start(call, self._reply(call, self._client.check_grammar(params)))
            case messages.ReadStatus(call):
                self._start(call, self._reply(call, self._client.status(), "status"))
            case messages.ReadMetrics(call):
                self._start(call, self._reply(call, self._all_metrics(), "metrics"))
            case messages.OwnMetrics(metrics):
                self.metrics = metrics
                if self._metrics_wait is not None and not self._metrics_wait.done():
                    self._metrics_wait.set_result(None)
            case messages.ConnectionsClosed(number):
                self.num_closed += number

    async def refresh_metrics(self) -> None:
        """Wait until `metrics` are those of now; without an end if the process does not answer."""
        if self._metrics_wait is None or self._metrics_wait.done():
            self._metrics_wait = asyncio.get_running_loop().create_future()
            self._send(messages.SendMetrics())
        await asyncio.shield(self._metrics_wait)

    def close(self) -> None:
        """Cancel the generations, and release the requests that were admitted."""
        for task in list(self._tasks.values()):
            task.cancel()
        while self._admitted:
            self._admitted.popitem()[1].close()

    def _admit(self, command: messages.Admit) -> None:
        stack = ExitStack()
        try:
            stack.enter_context(self._client.admission.admit(command.num_outputs, command.client))
        except ApiError as error:
            self._send(messages.CommandReply(command.call, failure=messages.EncodedError.of(error)))
        else:
            self._admitted[command.call] = stack
            self._send(messages.CommandReply(command.call))

    def _start(self, call: int, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[call] = asyncio.ensure_future(coroutine)
        task.add_done_callback(lambda _: self._tasks.pop(call, None))

    async def _generate(self, command: messages.Generate) -> None:
        try:
            with self._client.engine.in_progress():
                await self._forward(command)
        except Exception as error:  # noqa: BLE001 - logged if it is none of those that are expected
            self._send(messages.StreamFailed(command.call, _failure(error)))

    async def _forward(self, command: messages.Generate) -> None:
        """Generate the outputs of a prompt and send their events; cancels those that have not ended."""
        engine, call = self._client.engine, command.call
        prompt = PromptFields(prompt_token_ids=command.prompt_ids)
        if command.cache_salt is not None:
            prompt["cache_salt"] = command.cache_salt
        async with self._client.starting:  # a request with many prompts does not stop the events of others
            generation = await engine.prepare(prompt, command.params, command.origin)
            await asyncio.sleep(0)
        has_logprobs = generation.prompt_logprobs is not None
        stream = ForwardedStream(call, command.params.n, self._add_event, is_held=has_logprobs)
        with ExitStack() as unless_ended:
            engine.submit(generation, stream)
            unless_ended.callback(engine.cancel, generation)
            if has_logprobs:
                await stream.begun
                await self._send_prompt_logprobs(call, generation)
                stream.release()
            await stream.ended
            unless_ended.pop_all()

    async def _send_prompt_logprobs(self, call: int, generation: Generation) -> None:
        """Send the log-probabilities of a prompt in small parts: up to 500,000 candidates would stop all streams."""
        logprobs = generation.prompt_logprobs or []
        num_positions = max(1, PART_CANDIDATES // max((len(entry) for entry in logprobs if entry), default=1))
        for start in range(0, len(logprobs), num_positions):
            self._send(messages.PromptLogprobsPart(call, logprobs[start : start + num_positions]))
            await asyncio.sleep(0)

    async def _reply(self, call: int, work: Awaitable[Any], field: str = "") -> None:
        """Send the result of `work` in a field of the reply, if it has one, or the failure."""
        try:
            result = await work
            self._send(messages.CommandReply(call, **({field: result} if field else {})))
        except Exception as error:  # noqa: BLE001 - logged if it is none of those that are expected
            self._send(messages.CommandReply(call, failure=_failure(error)))

    def _add_event(self, event: messages.StreamEvent) -> None:
        """Send an event together with the others of the same turn of the loop, which are those of a step."""
        if not self._events:
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._send_bytes(encode(messages.StreamEvents(events)))

    def _send(self, notice: Any) -> None:
        self._flush()
        self._send_bytes(encode(notice))


def _failure(error: Exception) -> messages.EncodedError:
    failure = messages.EncodedError.of(error)
    if failure.kind is None and failure.status is None:
        log.error("a command of an API server failed", exc_info=error)
    return failure
