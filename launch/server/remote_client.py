"""The EngineClient of an API server process, over a link to the process of the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ...runtime.limits import Limits
from ...runtime.outputs import Event, PositionLogprobs
from ...runtime.request import NO_ORIGIN, Origin, PromptFields
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ..engine.async_tokenizer import AsyncTokenizer
from ..engine.event_streams import OutputQueue
from ..errors import EngineFailed
from . import api_server_messages as messages
from .api_server_messages import decode_notice, encode
from .engine_client import EngineStatus
from .request_metrics import RequestMetrics

REPLY_S = 30.0  # longest wait for the engine's process
GRAMMAR_REPLY_S = 180.0  # other grammars may be compiled first, and their process started again


class RemoteStream:
    """The events of one Generate."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self.queue = OutputQueue()
        self._prompt_ids = prompt_ids
        self._prompt_logprobs: PositionLogprobs | None = None

    def put(self, message: messages.StreamEvent) -> None:
        """Queue an event."""
        self.queue.put(message.event(self._prompt_ids, self._prompt_logprobs))

    def add_prompt_logprobs(self, part: PositionLogprobs) -> None:
        """Add the log-probabilities of the next positions of the prompt."""
        self._prompt_logprobs = self._prompt_logprobs or []
        self._prompt_logprobs.extend(part)


class RemoteEngineClient:
    """An EngineClient whose commands `send` carries to the engine's process, which answers through `receive`."""

    def __init__(
        self,
        name: str,
        started_at: int,
        limits: Limits,
        default_params: SamplingParams,
        tokenizer: AsyncTokenizer,
        send: Callable[[bytes], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        self.name, self.started_at, self.limits, self.default_params = name, started_at, limits, default_params
        self.tokenizer, self.metrics = tokenizer, RequestMetrics()
        self._send_bytes, self._on_shutdown = send, on_shutdown
        self._calls = itertools.count()
        self._replies: dict[int, asyncio.Future[messages.CommandReply]] = {}
        self._streams: dict[int, RemoteStream] = {}
        self._num_closed = 0  # connections, not reported yet

    def receive(self, message: bytes) -> None:
        """Take a message of the engine's process."""
        match decode_notice(message):
            case messages.StreamEvents(events):
                for event in events:
                    if (stream := self._streams.get(event.call)) is not None:  # its task may have been cancelled
                        stream.put(event)
            case messages.PromptLogprobsPart(call, logprobs):
                if (stream := self._streams.get(call)) is not None:
                    stream.add_prompt_logprobs(logprobs)
            case messages.StreamFailed(call, failure):
                if (stream := self._streams.get(call)) is not None:
                    stream.queue.put(failure.exception())
            case messages.CommandReply(call) as reply:
                if (future := self._replies.get(call)) is not None and not future.done():
                    future.set_result(reply)
            case messages.SendMetrics():
                self._send(messages.OwnMetrics(self.metrics))
            case messages.Shutdown():
                self._on_shutdown()

    @asynccontextmanager
    async def admit(self, num_outputs: int, client: int) -> AsyncIterator[None]:
        """Count a client's request as live within the block; raises ApiError if it cannot be admitted."""
        call = next(self._calls)
        try:
            await self._reply_to(messages.Admit(call, num_outputs, client))
            yield
        finally:
            self._send(messages.Release(call))

    async def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        """Do as AsyncEngine.generate."""
        fields = prompt if isinstance(prompt, dict) else PromptFields(prompt_token_ids=prompt)
        call, prompt_ids, num_unfinished = next(self._calls), list(fields["prompt_token_ids"]), params.n
        stream = self._streams[call] = RemoteStream(prompt_ids)
        self._send(messages.Generate(call, prompt_ids, fields.get("cache_salt"), params, origin))
        try:
            while num_unfinished > 0:
                for event in await stream.queue.get():
                    num_unfinished -= event.finished
                    yield event
        finally:
            del self._streams[call]
            if num_unfinished > 0:
                self._send(messages.CancelStream(call))

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint of outputs; raises RequestRefused if it cannot be used."""
        await self._reply_to(messages.CheckGrammar(next(self._calls), params), GRAMMAR_REPLY_S)

    async def status(self) -> EngineStatus:
        """Return the engine's state."""
        status = (await self._reply_to(messages.ReadStatus(next(self._calls)))).status
        assert status is not None
        return status

    async def all_metrics(self) -> RequestMetrics:
        """Return the metrics of the requests of all API servers."""
        metrics = (await self._reply_to(messages.ReadMetrics(next(self._calls)))).metrics
        assert metrics is not None
        return metrics

    async def tick(self) -> None:
        """Send the metrics, which also shows that this process is alive."""
        self._send(messages.OwnMetrics(self.metrics))

    def note_closed(self) -> None:
        """Report that a connection has ended, together with others of the same turn of the loop."""
        self._num_closed += 1
        if self._num_closed == 1:
            asyncio.get_running_loop().call_soon(self._report_closed)

    def _report_closed(self) -> None:
        self._send(messages.ConnectionsClosed(self._num_closed))
        self._num_closed = 0

    async def _reply_to(self, command: Any, timeout_s: float = REPLY_S) -> messages.CommandReply:
        """Send a command and return the reply; raises its failure, and EngineFailed after `timeout_s`."""
        future = self._replies[command.call] = asyncio.get_running_loop().create_future()
        try:
            self._send(command)
            await asyncio.wait((future,), timeout=timeout_s)
            if not future.done():
                raise EngineFailed(f"the server's main process has not answered for {timeout_s:g} s")
            reply: messages.CommandReply = future.result()
        finally:
            del self._replies[command.call]
        if reply.failure is not None:
            raise reply.failure.exception()
        return reply

    def _send(self, command: Any) -> None:
        self._send_bytes(encode(command))
