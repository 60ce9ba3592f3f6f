"""The HTTP server over a scripted engine, in a thread, and bodies that it answers."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache, partial
from typing import Any, cast

import httpx
import openai

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.engine.async_tokenizer import AsyncTokenizer
from lockstep.launch.engine.engine_state import AsyncEngineStats, EngineEvent, Health
from lockstep.launch.errors import EngineFailed
from lockstep.launch.server.draining_server import DrainingServer
from lockstep.launch.server.engine_client import EngineClient
from lockstep.launch.server.local_client import LocalEngineClient
from lockstep.launch.server.server_config import ServerConfig, ServerLimits
from lockstep.launch.server.server_socket import bind
from lockstep.launch.server.uvicorn_setup import create_uvicorn_config, run_loop
from lockstep.runtime.config import Config
from lockstep.runtime.detokenizer import Detokenizer
from lockstep.runtime.limits import Limits
from lockstep.runtime.outputs import Event, Logprob
from lockstep.runtime.rank_location import RankLocation
from lockstep.runtime.request import NO_ORIGIN, Origin, PromptFields
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.stats import EngineDistributions, EngineStats
from lockstep.runtime.structured_outputs import StructuredOutputsParams
from lockstep.runtime.tokenizer import Tokenizer

from small import SMALL
from waiting import join, wait_until

MAX_LEN = 512
PROMPT = "And the LORD said unto Moses"
CHAT = [{"role": "user", "content": "Who was Moses?"}]
KEY = "sk-of-the-tests"
COMPLETION = {"model": "demo", "prompt": PROMPT, "max_tokens": 4}
CHAT_BODY = {"model": "demo", "messages": CHAT, "max_tokens": 4}


@cache
def _shared_tokenizer(tokenizer: Tokenizer) -> AsyncTokenizer:
    """One set of processes for all services; they end with this one."""
    return AsyncTokenizer(tokenizer)


class FakeService:
    """The service's interface; tokens are a function of prompt, seed and position, a step takes `step_s` seconds."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = "demo"
        self.tokenizer = _shared_tokenizer(tokenizer)
        self._sync = tokenizer
        self.limits = Limits(
            max_model_len=MAX_LEN,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            num_pages=512,
            page_size=16,
            vocab_size=2048,
        )
        self.default_params = SamplingParams(temperature=0.7)
        self.health = Health("ready")
        self.step_s = 0.0
        self.script: str | None = None  # the text of all answers, in place of pseudo-random tokens
        self.stop_reason: str | None = None  # the stop string that ends the script
        self.paused = False
        self.hold_at = math.inf  # streams with this many tokens wait while it is so
        self.fails: EngineFailed | None = None
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.origins: list[Origin] = []
        self.salts: list[str | None] = []
        self.cancelled: list[int] = []  # at which step
        self.live = self.waiting = self.steps = 0
        self.closed = False

    @property
    def num_waiting(self) -> int:
        return self.waiting

    def stats(self) -> AsyncEngineStats:
        engine = EngineStats(steps=self.steps, preemptions=3)
        ranks, events = [RankLocation(0, "host", 1)], [EngineEvent(5.0, "rank 0 died")]
        seen = EngineDistributions()
        return AsyncEngineStats(self.live, self.live, self.waiting, 0.25, 384, 10, 40, engine, seen, 2, ranks, events)

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Take every grammar."""

    async def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        if self.health.state in ("failed", "draining"):
            raise EngineFailed(self.health.reason)
        ids = list(prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt)
        self.asked.append((ids, params))
        self.origins.append(origin)
        self.salts.append(prompt.get("cache_salt") if isinstance(prompt, dict) else None)
        texts = [Detokenizer(self._sync.token_bytes, ids) for _ in range(params.n)]
        lengths = [0] * params.n
        explained: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            explained = [None, *(self.candidates(token, params.prompt_logprobs) for token in ids[1:])]
        self.live += params.n
        ended = False
        assert params.max_tokens is not None
        try:
            script = None if self.script is None else self._sync.encode(self.script)
            for position in range(min(params.max_tokens, len(script or range(params.max_tokens)))):
                await asyncio.sleep(self.step_s)
                while (self.paused or position >= self.hold_at) and not self.closed:
                    await asyncio.sleep(0.002)
                if self.fails is not None and position == 2:
                    raise self.fails
                self.steps += 1
                is_complete = script is not None and position == len(script) - 1
                last = is_complete or position == params.max_tokens - 1
                end = "stop" if is_complete else "length"
                reason = "abort" if self.closed else end if last else None
                for index in range(params.n):
                    token = 100 + (sum(ids) * 31 + (params.seed or 0) * 7 + index * 13 + position * 17) % 1800
                    token = token if script is None else script[position]
                    offsets = [lengths[index] + texts[index].peek(token)[1]]
                    text = texts[index].push(token) + (texts[index].flush() if last else "")
                    lengths[index] += len(text)
                    logprobs = None if params.logprobs is None else [self.candidates(token, params.logprobs)]
                    stop_reason = self.stop_reason if reason == "stop" else None
                    yield Event(
                        index, text, [token], logprobs, reason, stop_reason, ids, 4, explained,
                        text_offsets=None if params.logprobs is None else offsets,
                    )  # type: ignore[arg-type]  # fmt: skip
            ended = True
        finally:
            self.live -= params.n
            if not ended:
                self.cancelled.append(self.steps)

    def candidates(self, token: int, number: int) -> dict[int, Logprob]:
        """The chosen token is always the second best; the last one is impossible."""
        others = [t for t in range(300, 300 + number + 1) if t != token][:number]
        ids = [*others[:1], token, *others[1:]] if number else [token]
        found = {t: self._logprob(t, -1.0 - i, i + 1) for i, t in enumerate(ids[: max(number, 1)])}
        found.setdefault(token, self._logprob(token, -2.0, 2))
        if number > 2:
            found[ids[number - 1]] = self._logprob(ids[number - 1], float("-inf"), number)
        return {token: found.pop(token)} | found

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        token_bytes = self._sync.token_bytes
        return Logprob(value, rank, token_bytes.text(token), token_bytes[token])

    async def close(self, drain_timeout: float = 0.0) -> None:
        self.health = Health("draining", "the server is shutting down")
        until = time.monotonic() + drain_timeout
        while self.live and time.monotonic() < until:
            await asyncio.sleep(0.005)
        self.closed = True
        while self.live:
            await asyncio.sleep(0.005)


class Running:
    """A server on a free port, in a thread."""

    def __init__(
        self,
        service: FakeService | AsyncEngine,
        limits: ServerLimits | None = None,
        new_client: Callable[[AsyncEngine, ServerConfig, ServerLimits], EngineClient] = LocalEngineClient,
        **options: Any,
    ) -> None:
        config = ServerConfig(**({"port": 0} | options))
        self.service = service
        self.port = bind(config)
        self.url = f"http://127.0.0.1:{self.port.getsockname()[1]}"
        own = cast(AsyncEngine, service)
        limits = limits or ServerLimits()
        client = new_client(own, config, limits)
        self.server = DrainingServer(create_uvicorn_config(client, config, limits), own, config)
        serve = partial(run_loop, self.server.serve(sockets=[self.port]))
        self.thread = threading.Thread(target=serve, name=f"server {self.url}", daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.http.post(path, json=body, **more)

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self.server.should_exit = self.server.force_exit = True
        join(self.thread, 30)


@contextmanager
def demo_server(**options: Any) -> Iterator[Running]:
    """Serve the demo model with a small real engine; `options` are fields of ServerConfig."""
    engine = AsyncEngine(Config(**SMALL))
    engine.start()
    try:
        with closing(Running(engine, **options)) as running:
            yield running
    finally:
        asyncio.run(engine.close())


def fake(running: Running) -> FakeService:
    assert isinstance(running.service, FakeService)
    return running.service


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error in OpenAI's envelope, which must be all of the body."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert len(response.content) < 2000
    return dict(body["error"])


def expected_text(tokenizer: Tokenizer, ids: list[int], number: int, seed: int = 0, index: int = 0) -> str:
    tokens = [100 + (sum(ids) * 31 + seed * 7 + index * 13 + p * 17) % 1800 for p in range(number)]
    detokenizer = Detokenizer(tokenizer.token_bytes, ids)
    return "".join(detokenizer.push(t) for t in tokens) + detokenizer.flush()
