"""Requests to a server, each at its time; what became of each is a Record, never an exception."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import numpy as np
from tqdm import tqdm

from ..client import Chunk, Events, connection, describe, first_model, refusal
from .datasets import Prompt
from .serve_config import ServeBenchConfig
from .serve_metrics import Record

POLL_S = 0.5
Ask = Callable[[Prompt], Awaitable[Record]]


@dataclass(frozen=True)
class Target:
    """A model of a server, and what every request to it has in common."""

    client: httpx.AsyncClient
    path: str
    chat: bool
    common: dict[str, Any]

    def body(self, prompt: Prompt) -> dict[str, Any]:
        if self.chat:
            messages = [{"role": "user", "content": prompt.content}]
            return {"messages": messages, "max_completion_tokens": prompt.output_len, **self.common}
        return {"prompt": prompt.content, "max_tokens": prompt.output_len, **self.common}

    async def ask(self, prompt: Prompt) -> Record:
        """Send a request and follow its stream to the end."""
        content = msgspec.json.encode(self.body(prompt))
        follow, events = Following(Record(prompt.num_tokens, started=time.perf_counter())), Events()
        try:
            async with self.client.stream("POST", self.path, content=content) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, await response.aread())
                async for piece in response.aiter_bytes():
                    now = time.perf_counter()
                    for chunk in events.push(piece):
                        follow.add(chunk, now)
            follow.end()
        except (httpx.HTTPError, ValueError) as error:
            follow.record.error = describe(error)
        return follow.record


class Following:
    """Fills a record with the chunks of a stream."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._complete = False

    def add(self, chunk: Chunk, now: float) -> None:
        """A chunk that came at `now`. One that only says who speaks, or only that it is over, brings no token."""
        record = self.record
        for choice in chunk.choices:
            closes = choice.finish_reason is not None and not choice.new_text and bool(record.chunk_times)
            if not (choice.opens or closes):
                record.chunk_times.append(now)
            record.ended = now
            record.text += choice.new_text
            self._complete |= choice.finish_reason is not None
        if chunk.usage is not None:
            record.prompt_len = chunk.usage.prompt_tokens or record.prompt_len
            record.output_len = chunk.usage.completion_tokens

    def end(self) -> None:
        """Raises ValueError for a stream that was cut off; without a usage, each chunk counts as a token."""
        if not (self._complete and self.record.chunk_times):
            raise ValueError(f"the stream ended after {len(self.record.chunk_times)} chunks, without a finish reason")
        self.record.output_len = self.record.output_len or len(self.record.chunk_times)


@asynccontextmanager
async def connected(load: ServeBenchConfig, model: str | None) -> AsyncIterator[Target]:
    """The server, once it answers; raises ValueError when it does not in time."""
    async with httpx.AsyncClient(**connection(load.url)) as client:
        if model is None or load.ready_check_timeout_sec:
            model = await _wait_ready(client, load.ready_check_timeout_sec, model)
        common: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        if load.temperature is not None:
            common["temperature"] = load.temperature
        if load.ignore_eos or load.dataset_name == "random":
            common["ignore_eos"] = True
        yield Target(client, load.path, load.chat, common)


async def _wait_ready(client: httpx.AsyncClient, timeout_s: float, model: str | None) -> str:
    """Ask for the models until there is an answer; returns the first one, or `model`."""
    until = time.perf_counter() + timeout_s
    while True:
        try:
            response = await client.get("/v1/models")
        except httpx.HTTPError as error:
            reason = describe(error)
        else:
            if response.status_code < 500:
                return model or first_model(response)
            reason = str(refusal(response.status_code, response.content))
        if time.perf_counter() >= until:
            raise ValueError(f"{client.base_url} does not answer: {reason}; start it, or set --base-url")
        await asyncio.sleep(POLL_S)


def arrivals(number: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which requests are sent, `rate` a second: gaps of a gamma distribution of this shape.

    Scaled so that the last one is sent at number / rate, whatever was drawn, as vLLM does.
    """
    if math.isinf(rate):
        return [0.0] * number
    if math.isinf(burstiness):
        gaps = np.ones(number)
    else:
        gaps = np.random.default_rng([seed, number]).gamma(burstiness, size=number)
    times = np.cumsum(gaps)
    return (times * (number / rate / times[-1])).tolist() if times[-1] > 0 else [0.0] * number


async def send_all(
    prompts: Sequence[Prompt], times: Sequence[float], ask: Ask, max_concurrency: int | None, bar: tqdm[Any]
) -> list[Record]:
    """Ask for all prompts, each at its time or, with `max_concurrency`, once it is its turn; records in their order."""
    started = time.perf_counter()
    gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def one(prompt: Prompt, at: float) -> Record:
        await asyncio.sleep(started + at - time.perf_counter())
        async with gate:
            record = await ask(prompt)
        bar.update()
        return record

    return await asyncio.gather(*(one(prompt, at) for prompt, at in zip(prompts, times, strict=True)))
