"""The life of an HTTP request: read, checked, admitted, tokenized, generated, answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from ...runtime.outputs import Event
from ...runtime.request import RequestRefused, SamplingParams
from ...runtime.tokenizer import Message
from ...runtime.version import __version__
from ..engine.async_engine import AsyncEngine
from .api_errors import ApiError
from .health import Liveness
from .http_io import BodyBudget, StreamingAnswer, read_body, send_events, send_json
from .metrics import Metrics, Timing
from .protocol.request_models import ChatMessage, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .protocol.response_models import Detokenized, Healthy, Model, ModelList, PromptDetails, Tokens, Usage, Version
from .response_builders import Chat, Completions, EchoedPrompt, ResponseBuilder
from .server_config import ServerConfig
from .structured_fields import refused
from .validation import GenerateRequest, RequestValidator, num_top

log = logging.getLogger(__name__)


@dataclass
class TokenUsage:
    """Tokens of a request, for `usage` and the log."""

    prompt: int
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # of each prompt

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            total_tokens=self.prompt + self.completion,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(self.cached.values())),
        )


class Handlers:
    """The routes, over a service that has been started."""

    def __init__(self, service: AsyncEngine, config: ServerConfig) -> None:
        self._service, self._config = service, config
        self._rules = RequestValidator(service, config)
        self._tokenizer = service.tokenizer
        self._reading = BodyBudget(config.max_body_bytes)
        self._metrics = Metrics(self._rules.names[0], service.stats)
        self._started = int(time.time())
        self._requests = self._outputs = 0  # live
        self.pulse = Liveness(service)

    # -- generation

    async def completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest, self._reading)
        return StreamingAnswer(lambda send: self._complete(body, send))

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, ChatRequest, self._reading)
        return StreamingAnswer(lambda send: self._converse(body, send))

    async def _complete(self, body: CompletionRequest, send: Send) -> None:
        prompts = _as_list(body.prompt)
        with self._admitted(self._rules.check(body, len(prompts))):
            ids = await self._ids(prompts)
            skip = body.skip_special_tokens is not False
            echoes = [await self._echo(p, own, skip=skip) for p, own in zip(prompts, ids, strict=True) if body.echo]
            dialect = Completions(self._model(body), body.n or 1, echoes, num_top(body))
            await self._answer(body, ids, dialect, send)

    async def _converse(self, body: ChatRequest, send: Send) -> None:
        with self._admitted(self._rules.check(body, 1)):
            ids = await self._tokenizer.encode_chat(_template_messages(body.messages))
            await self._answer(body, [ids], Chat(self._model(body), num_top(body)), send)

    async def _answer(
        self, body: GenerateRequest, prompts: list[list[int]], dialect: ResponseBuilder, send: Send
    ) -> None:
        params = [self._rules.params(body, len(ids)) for ids in prompts]
        tally, started, outcome = TokenUsage(sum(map(len, prompts))), time.perf_counter(), "failed"
        try:
            async with aclosing(self._pieces(prompts, params, tally)) as pieces:
                if body.stream:
                    options = body.stream_options
                    with_usage = options is not None and bool(options.include_usage)
                    await send_events(send, _chunks(pieces, dialect, tally if with_usage else None))
                else:
                    whole = await _whole(pieces, len(prompts) * (body.n or 1))
                    await send_json(send, dialect.whole(whole, tally.usage()))
            outcome = "answered"
        except RequestRefused as error:
            raise refused(error, body) from error
        except asyncio.CancelledError:
            self._metrics.ended("abort")
            outcome = "left by its client"
            raise
        finally:
            if self._config.log_requests:
                log.info(
                    "request %s: %d prompts of %d tokens, %d tokens generated, %.3f s",
                    outcome, len(prompts), tally.prompt, tally.completion, time.perf_counter() - started,
                )  # fmt: skip

    async def _pieces(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], tally: TokenUsage
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Events of all prompts as they come, each with the number of its choice; closing it cancels them all."""
        timings = [Timing(self._metrics) for _ in prompts]
        streams = [self._service.generate(ids, own) for ids, own in zip(prompts, params, strict=True)]
        async with aclosing(_merged(streams)) as events:
            async for prompt, event in events:
                timings[prompt].saw(event)
                tally.completion += len(event.token_ids)
                tally.cached[prompt] = event.num_cached_tokens
                if event.finish_reason == "error":
                    raise ApiError(400, str(event.stop_reason), code="structured_outputs_failed")
                if event.finish_reason == "abort":
                    why = event.stop_reason or "the server is shutting down"
                    raise ApiError(503, f"the server has ended this request: {why}", code="aborted")
                yield prompt * params[prompt].n + event.index, event

    @contextmanager
    def _admitted(self, outputs: int) -> Iterator[None]:
        """Hold a place for a request of so many outputs; raises ApiError where there is none."""
        health = self._service.health
        if health.state in ("starting", "draining", "failed"):
            raise ApiError(
                503, f"the server takes no requests: it is {health.state}, {health.reason}", code=health.state
            )
        queued = self._outputs + outputs - self._service.limits.max_num_seqs
        full = max(queued, self._service.stats().waiting) > self._config.max_queued
        if full or self._requests >= self._config.max_concurrent_requests:
            message = f"the server is busy: {self._requests} requests with {self._outputs} outputs; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        self._requests, self._outputs = self._requests + 1, self._outputs + outputs
        try:
            yield
        finally:
            self._requests, self._outputs = self._requests - 1, self._outputs - outputs

    async def _ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        texts = [p for p in prompts if isinstance(p, str)]
        if texts:  # then all of them are
            return await self._tokenizer.encode(texts)
        given = [p for p in prompts if not isinstance(p, str)]
        for ids in given:
            self._rules.check_ids(ids, "prompt")
        return given

    async def _echo(self, prompt: str | list[int], ids: list[int], *, skip: bool) -> EchoedPrompt:
        text = prompt if isinstance(prompt, str) else await self._tokenizer.decode(prompt, skip_special_tokens=skip)
        return EchoedPrompt(text, await self._tokenizer.decode(ids[:1], skip_special_tokens=True))

    def _model(self, body: GenerateRequest) -> str:
        return body.model or self._rules.names[0]

    # -- everything else

    async def models(self, request: Request) -> ModelList:
        health = self._service.health
        if health.state == "failed":
            raise ApiError(503, f"the engine has failed: {health.reason}", code="failed")
        longest = self._rules.max_total
        return ModelList(data=[Model(id=n, created=self._started, max_model_len=longest) for n in self._rules.names])

    async def tokenize(self, request: Request) -> Tokens:
        body = await read_body(request, TokenizeRequest, self._reading)
        self._rules.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            ids = await self._tokenizer.encode_chat(_template_messages(body.messages))
        else:
            ids = (await self._tokenizer.encode([body.prompt or ""]))[0]
        strings = await self._tokenizer.decode_each(ids) if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=self._rules.max_total, tokens=ids, token_strs=strings)

    async def detokenize(self, request: Request) -> Detokenized:
        body = await read_body(request, DetokenizeRequest, self._reading)
        self._rules.check_model(body.model)
        self._rules.check_ids(body.tokens, "tokens")
        return Detokenized(prompt=await self._tokenizer.decode(body.tokens, skip_special_tokens=False))

    async def health(self, request: Request) -> Healthy:
        reason = self.pulse.trouble()
        if reason is not None:
            raise ApiError(503, reason, code=self._service.health.state)
        return Healthy()

    async def version(self, request: Request) -> Version:
        return Version(version=__version__)

    async def stats(self, request: Request) -> Response:
        """What the page shows of the engine."""
        stats, health = self._service.stats(), self._service.health
        engine = stats.engine
        found = {
            "state": health.state, "reason": health.reason, "restarts": stats.restarts,
            "running": stats.running, "waiting": stats.waiting, "kv_usage": stats.kv_usage,
            "cached_tokens": stats.prefix_hits, "prompt_tokens": engine.prompt_tokens,
            "output_tokens": engine.output_tokens, "steps": engine.steps, "preemptions": engine.preemptions,
            "ranks": [rank._asdict() for rank in stats.ranks],
        }  # fmt: skip
        return JSONResponse(found)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")


async def _chunks(
    pieces: AsyncIterator[tuple[int, Event]], dialect: ResponseBuilder, tally: TokenUsage | None
) -> AsyncIterator[BaseModel]:
    async for choice, event in pieces:
        for chunk in dialect.chunks(choice, event):
            yield chunk
    if tally is not None:
        yield dialect.last(tally.usage())


async def _whole(pieces: AsyncIterator[tuple[int, Event]], number: int) -> list[Event]:
    """Return one event for each choice, joined from all of its events."""
    choices: list[list[Event]] = [[] for _ in range(number)]
    async for choice, event in pieces:
        choices[choice].append(event)
    return [events[0].joined(*events[1:]) for events in choices]


async def _merged(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of all streams as they come; ends them all when it is closed or one of them fails."""
    if len(streams) == 1:  # most requests: saves a task and a queue
        async with aclosing(streams[0]) as stream:
            async for event in stream:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Event, None]) -> None:
        async for event in stream:
            queue.put_nowait((number, event))

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, tuple):
                yield item
            else:
                item.result()
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return the messages in the form of chat templates, which know `system` and take one string.

    Parts are joined by a new line, as in vLLM.
    """
    roles = ["system" if message.role == "developer" else message.role for message in messages]
    contents = [m.content if isinstance(m.content, str) else "\n".join(p.text for p in m.content) for m in messages]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt as a list of one."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [p for p in prompt if isinstance(p, str)]
    lists = [p for p in prompt if isinstance(p, list)]
    return [*texts, *lists] or [[i for i in prompt if isinstance(i, int)]]
