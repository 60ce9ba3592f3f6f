"""The handlers of all routes: one method for each, and the generation that completions and chats share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import datetime, timezone
from functools import partial

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Send

from ...comm.message_text import counted
from ...runtime.detokenizer import PromptText
from ...runtime.outputs import Event
from ...runtime.request import Origin, PromptFields, RequestRefused
from ...runtime.sampling_params import SamplingParams
from ...runtime.version import __version__
from ..engine.event_streams import merge
from .api_errors import ApiError, without_folders
from .block_builder import BlockBuilder
from .body_structure import MAX_ITEMS
from .chat_preparation import ChatPreparer, PreparedChat, as_chat
from .engine_client import EngineClient
from .http_io import BodyBudget, StreamingAnswer, make_long, read_body, send_events, send_json
from .messages_builder import MessagesBuilder
from .metrics import metrics_page
from .protocol.anthropic_models import CountTokensRequest, MessagesRequest
from .protocol.reply_models import Detokenized, Healthy, InputTokens, Model, ModelList, Tokens, Version
from .protocol.request_models import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from .protocol.responses_models import ResponsesRequest
from .reply_builders import ChatBuilder, CompletionBuilder, ReplyBuilder, ReplyOptions
from .request_id import REQUEST_ID
from .request_metrics import PromptTimer
from .request_origin import ClientRecognition
from .responses_builder import ResponsesBuilder
from .server_config import ServerConfig, ServerLimits
from .token_usage import TokenUsage
from .validation import RequestValidator, from_refusal, num_top_logprobs, structured_outputs

AnyBuilder = ReplyBuilder | BlockBuilder
NewBuilder = Callable[[str, TokenUsage, PreparedChat], AnyBuilder]  # (name of the model, usage, chat)

log = logging.getLogger(__name__)


class Handlers:
    """The handlers over an engine that has been started."""

    def __init__(self, engine: EngineClient, config: ServerConfig, limits: ServerLimits) -> None:
        self._engine, self._log_requests = engine, config.log_requests
        self._names_ids = config.return_tokens_as_token_ids
        self._validator = RequestValidator(engine, config)
        self._clients = ClientRecognition(config)
        self._tokenizer = engine.tokenizer
        max_items = max(MAX_ITEMS, 2 * self._validator.max_model_len)
        self._body_budget = BodyBudget(config.max_body_bytes, limits.max_bodies, max_items)
        self._chats = ChatPreparer(engine.tokenizer, engine.check_grammar, config)
        self._metrics = engine.metrics
        self._starting = asyncio.Lock()  # of the prompts of requests with several

    async def completions(self, request: Request) -> Response:
        """Serve POST /v1/completions."""
        return self._answer(request, await read_body(request, CompletionRequest, self._body_budget))

    async def chat(self, request: Request) -> Response:
        """Serve POST /v1/chat/completions."""
        return self._answer(request, await read_body(request, ChatRequest, self._body_budget))

    async def responses(self, request: Request) -> Response:
        """Serve POST /v1/responses."""
        body = await read_body(request, ResponsesRequest, self._body_budget)
        return self._answer(request, body, partial(ResponsesBuilder, body))

    async def messages(self, request: Request) -> Response:
        """Serve POST /v1/messages."""
        return self._answer(request, await read_body(request, MessagesRequest, self._body_budget), MessagesBuilder)

    async def count_tokens(self, request: Request) -> InputTokens:
        """Serve POST /v1/messages/count_tokens."""
        body = as_chat(await read_body(request, CountTokensRequest, self._body_budget))
        self._validator.check_model(body.model)
        return InputTokens(input_tokens=len(await self._chats.prompt(body)))

    def _answer(
        self,
        request: Request,
        sent: GenerateRequest | ResponsesRequest | MessagesRequest,
        new_builder: NewBuilder | None = None,
    ) -> Response:
        """Return the response to a body; `new_builder` is that of the API if the body is computed as a chat."""
        origin = self._clients.origin(request, sent)
        body = as_chat(sent) if isinstance(sent, (ResponsesRequest, MessagesRequest)) else sent
        num_outputs = self._validator.check(body)
        if isinstance(body, ChatRequest):
            self._chats.check(body)

        async def answer(send: Send) -> None:
            async with self._engine.admit(num_outputs, origin.client):
                await self._generate(body, send, origin, new_builder)

        return StreamingAnswer(answer)

    async def _prompts(self, body: GenerateRequest) -> tuple[list[list[int]], PreparedChat | None]:
        """Return the token ids of each prompt, and the chat if the body is one."""
        limit, chat = self._validator.max_encoded(body), None
        if isinstance(body, ChatRequest):
            chat = await self._chats.prepare(body, structured_outputs(body), limit)
            prompts = [chat.prompt]
        elif texts := [prompt for prompt in body.prompts if isinstance(prompt, str)]:
            with_special = body.add_special_tokens is not False
            prompts = await self._tokenizer.encode(texts, limit, add_special_tokens=with_special)
        else:  # a body has texts or token ids, never both
            prompts = [prompt for prompt in body.prompts if not isinstance(prompt, str)]
        return [self._validator.truncated(body, ids) for ids in prompts], chat

    async def _builder(
        self, body: GenerateRequest, prompts: list[list[int]], usage: TokenUsage, chat: PreparedChat | None
    ) -> ReplyBuilder:
        model, stream = body.model or self._validator.model_names[0], body.stream_options
        num_top = num_top_logprobs(body)
        if isinstance(body, ChatRequest) and body.logprob_token_ids:
            num_top = len(body.logprob_token_ids) + 1  # a chat lists the sampled token too
        options = ReplyOptions(
            num_top,
            self._names_ids if body.return_tokens_as_token_ids is None else body.return_tokens_as_token_ids,
            bool(body.return_token_ids),
            body.prompt_logprobs,
            usage=stream is not None and bool(stream.include_usage),
            usage_in_every_chunk=stream is not None and bool(stream.continuous_usage_stats),
        )
        if isinstance(body, ChatRequest):
            assert chat is not None
            return ChatBuilder(model, options, usage, chat, keeps_reasoning=body.include_reasoning is not False)
        echoes = await self._echo(body, prompts) if body.echo else []
        return CompletionBuilder(model, options, usage, body.n or 1, echoes)

    async def _echo(self, body: CompletionRequest, prompts: list[list[int]]) -> list[PromptText]:
        """Return the prompts for `echo`: texts as they came, and the texts of token ids with all special tokens."""
        echoes = []
        for prompt, ids in zip(body.prompts, prompts, strict=True):
            text = prompt if isinstance(prompt, str) and body.truncate_prompt_tokens is None else None
            if text is not None and body.logprobs is None:
                echoes.append(PromptText(text))
            else:
                echoes.append(await self._tokenizer.locate_tokens(ids, text))
        return echoes

    async def _generate(
        self, body: GenerateRequest, send: Send, origin: Origin, new_builder: NewBuilder | None
    ) -> None:
        """Generate the outputs of all prompts and send the response, as a stream if the body says so."""
        prompts, chat = await self._prompts(body)
        usage = TokenUsage(sum(map(len, prompts)))
        self._validator.check_prompt_logprobs(body, usage.num_prompt)
        constraint = chat.constraint if chat else structured_outputs(body)
        params = self._validator.sampling_params(body, [len(ids) for ids in prompts], constraint)
        if chat is not None and chat.keeps_special_tokens:
            params = [msgspec.structs.replace(p, skip_special_tokens=False) for p in params]
        if chat is not None and new_builder is not None:
            builder: AnyBuilder = new_builder(body.model or self._validator.model_names[0], usage, chat)
        else:
            builder = await self._builder(body, prompts, usage, chat)
        with self._noting_end(len(prompts), usage):
            try:
                async with aclosing(self._events(body, prompts, params, usage, origin)) as events:
                    if body.stream:
                        await send_events(send, builder.stream(events), builder.failure, builder.end_of_stream)
                    else:
                        await send_json(send, await builder.whole(events))
            except RequestRefused as error:
                raise from_refusal(error, body) from error

    @contextmanager
    def _noting_end(self, num_prompts: int, usage: TokenUsage) -> Iterator[None]:
        """Count a request that its client cancels, and log the end of every one with --log-requests."""
        started, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "answered"
        except asyncio.CancelledError:
            self._metrics.count_end("abort")
            outcome = "cancelled by its client"
            raise
        finally:
            if self._log_requests:
                log.info(
                    "request %s %s: %s of %s, %s generated, %.3f s",
                    REQUEST_ID.get(), outcome, counted(num_prompts, "prompt"), counted(usage.num_prompt, "token"),
                    counted(usage.num_completion, "token"), time.perf_counter() - started,
                )  # fmt: skip

    async def _events(
        self,
        body: GenerateRequest,
        prompts: list[list[int]],
        params: list[SamplingParams],
        usage: TokenUsage,
        origin: Origin,
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield the events of all prompts in the order of arrival, each with the index of its choice in the response.

        Updates `usage` and the metrics. Closing the generator cancels all outputs that have not ended.
        Raises ApiError when an output ends with an error, or because the server shuts down.
        """
        timers = [PromptTimer(self._metrics, p.n) for p in params]
        salt, is_echo_only = body.cache_salt, body.max_tokens == 0
        salted = [ids if salt is None else PromptFields(prompt_token_ids=ids, cache_salt=salt) for ids in prompts]
        streams = [self._engine.generate(prompt, p, origin) for prompt, p in zip(salted, params, strict=True)]
        async with aclosing(merge(streams, self._starting)) as events:
            async for prompt, event in events:
                if is_echo_only:
                    event = event.without_tokens()
                timers[prompt].observe(event)
                usage.update(prompt, event)
                if event.finish_reason == "error":
                    raise ApiError(400, str(event.stop_reason), code="structured_outputs_failed")
                if event.finish_reason == "abort":
                    reason = event.stop_reason or "the server is shutting down"
                    raise ApiError(503, f"the server has ended this request: {reason}", code="aborted")
                yield prompt * params[prompt].n + event.index, event

    async def models(self, request: Request) -> ModelList:
        """Serve GET /v1/models."""
        health = (await self._engine.status()).health
        if health.state == "failed":
            raise ApiError(503, f"the engine has failed: {health.reason}", code="failed")
        models = [self._model(name) for name in self._validator.model_names]
        return ModelList(data=models, first_id=models[0].id, last_id=models[-1].id)

    async def model(self, request: Request) -> Model:
        """Serve GET /v1/models/{name}, where a name may have slashes."""
        name = request.path_params["name"]
        self._validator.check_model(name)
        return self._model(name)

    def _model(self, name: str) -> Model:
        root, created = self._engine.name.rstrip("/").rpartition("/")[2], self._engine.started_at
        return Model(
            id=name, created=created, root=root, max_model_len=self._validator.max_model_len, display_name=name,
            created_at=datetime.fromtimestamp(created, timezone.utc), max_input_tokens=self._validator.max_input,
        )  # fmt: skip

    async def tokenize(self, request: Request) -> Response:
        """Serve POST /tokenize."""
        body = await read_body(request, TokenizeRequest, self._body_budget)
        self._validator.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            ids = await self._chats.prompt(body)
        else:
            with_special = body.add_special_tokens is not False
            (ids,) = await self._tokenizer.encode([body.prompt or ""], add_special_tokens=with_special)
        texts = await self._tokenizer.names(ids) if body.return_token_strs else None
        limit = self._validator.max_model_len
        return await _json_response(
            Tokens.model_construct(count=len(ids), max_model_len=limit, tokens=ids, token_strs=texts)
        )

    async def detokenize(self, request: Request) -> Response:
        """Serve POST /detokenize."""
        body = await read_body(request, DetokenizeRequest, self._body_budget)
        self._validator.check_model(body.model)
        self._validator.check_token_ids(body.tokens, "tokens")
        text = await self._tokenizer.decode(body.tokens, skip_special_tokens=False)
        return await _json_response(Detokenized.model_construct(prompt=text))

    async def tokenizer_info(self, request: Request) -> Response:
        """Serve GET /tokenizer_info, the contents of tokenizer_config.json."""
        return JSONResponse(self._tokenizer.source.info)

    async def health(self, request: Request) -> Healthy:
        """Serve GET /health: 503 with the reason unless the engine is ready and makes progress."""
        status = await self._engine.status()
        health = status.health
        if health.state != "ready":
            raise ApiError(503, f"the engine is {health.state}: {health.reason}", code=health.state)
        if status.stall is not None:
            raise ApiError(503, f"the engine has made {status.stall}", code=health.state)
        return Healthy()

    async def version(self, request: Request) -> Version:
        """Serve GET /version."""
        return Version(version=__version__)

    async def stats(self, request: Request) -> Response:
        """Serve GET /stats, the statistics of the engine for the page."""
        status = await self._engine.status()
        stats, health, engine = status.stats, status.health, status.stats.engine
        rank_state = "running" if health.state in ("ready", "draining") else "ended"
        fields = {
            "state": health.state, "reason": without_folders(health.reason), "restarts": stats.restarts,
            "running": stats.running, "waiting": stats.waiting, "kv_usage": stats.kv_usage,
            "cached_tokens": stats.prefix_hits, "prefix_queries": stats.prefix_queries,
            **msgspec.structs.asdict(engine),
            "ranks": [{**msgspec.structs.asdict(rank), "state": rank_state} for rank in stats.ranks],
            "events": [event._asdict() for event in stats.events],
        }  # fmt: skip
        return JSONResponse(fields)

    async def metrics(self, request: Request) -> Response:
        """Serve GET /metrics."""
        status, requests = await self._engine.status(), await self._engine.all_metrics()
        page = metrics_page(self._validator.model_names[0], status.stats, requests)
        return Response(page, media_type="text/plain; version=0.0.4")


async def _json_response(reply: BaseModel) -> Response:
    return Response(await make_long(lambda: reply.model_dump_json().encode()), media_type="application/json")
