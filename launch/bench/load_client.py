"""The client of `lockstep bench serve`: sends requests at given times and records the result or error of each."""

from __future__ import annotations

import asyncio
import logging
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

from ..http_client import Chunk, EventParser, connection, describe, first_model, refusal
from .datasets import DatasetPrompt
from .serve_config import ServeBenchConfig
from .serve_metrics import RequestRecord
from .stream_transport import StreamTransport

log = logging.getLogger(__name__)
POLL_S = 0.5
Send = Callable[[DatasetPrompt], Awaitable[RequestRecord]]


@dataclass(frozen=True)
class LoadTarget:
    """A model of a server, and the fields that every request to it has."""

    client: httpx.AsyncClient
    path: str
    is_chat: bool
    common: dict[str, Any]

    def body(self, prompt: DatasetPrompt) -> dict[str, Any]:
        """Return the body of a request."""
        if self.is_chat:
            messages = [{"role": "user", "content": prompt.content}]
            return {"messages": messages, "max_completion_tokens": prompt.output_len, **self.common}
        return {"prompt": prompt.content, "max_tokens": prompt.output_len, **self.common}

    async def send(self, prompt: DatasetPrompt) -> RequestRecord:
        """Send a request and read its stream to the end; an error goes into the record."""
        content = msgspec.json.encode(self.body(prompt))
        reader, events = StreamReader(RequestRecord(prompt.num_tokens, started=time.perf_counter())), EventParser()
        try:
            async with self.client.stream("POST", self.path, content=content) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, await response.aread())
                async for piece in response.aiter_raw():
                    now = time.perf_counter()
                    for chunk in events.push(piece):
                        reader.add(chunk, now)
            reader.end()
        except (httpx.HTTPError, ValueError) as error:
            reader.record.error = describe(error)
        return reader.record


class StreamReader:
    """Fills a record from the chunks of a stream."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self._complete = False

    def add(self, chunk: Chunk, now: float) -> None:
        """Record a chunk that arrived at `now`; a chunk with only the role or the finish reason has no token."""
        record = self.record
        for choice in chunk.choices:
            is_finish_only = choice.finish_reason is not None and not choice.new_text and bool(record.chunk_times)
            if not (choice.is_role_only or is_finish_only):
                record.chunk_times.append(now)
            record.ended = now
            record.text += choice.new_text
            self._complete |= choice.finish_reason is not None
        if chunk.usage is not None:
            record.prompt_len = chunk.usage.prompt_tokens or record.prompt_len
            record.output_len = chunk.usage.completion_tokens

    def end(self) -> None:
        """Complete the record: without a usage, each chunk counts as a token.

        Raises ValueError for a stream that was cut off.
        """
        if not (self._complete and self.record.chunk_times):
            raise ValueError(f"the stream ended after {len(self.record.chunk_times)} chunks, without a finish reason")
        self.record.output_len = self.record.output_len or len(self.record.chunk_times)


@asynccontextmanager
async def connect_to_server(config: ServeBenchConfig, model: str | None) -> AsyncIterator[LoadTarget]:
    """Wait until the server answers and yield its model; raises ValueError if it does not answer in time."""
    options = connection(config.url)
    options["headers"]["accept-encoding"] = "identity"  # pieces are read as they come
    async with httpx.AsyncClient(transport=StreamTransport(), **options) as client:
        if model is None or config.ready_check_timeout_sec:
            model = await _wait_ready(client, config.ready_check_timeout_sec, model)
        common: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        if config.temperature is not None:
            common["temperature"] = config.temperature
        if config.ignore_eos or config.dataset_name == "random":
            common["ignore_eos"] = True
        yield LoadTarget(client, config.path, config.is_chat, common)


async def _wait_ready(client: httpx.AsyncClient, timeout_s: float, model: str | None) -> str:
    """Request the list of models until there is an answer; returns the first model, or `model`."""
    deadline, is_announced = time.perf_counter() + timeout_s, False
    while True:
        try:
            response = await client.get("/v1/models")
        except httpx.HTTPError as error:
            reason = describe(error)
        else:
            if response.status_code < 500:
                return model or first_model(response)
            reason = str(refusal(response.status_code, response.content))
        if time.perf_counter() >= deadline:
            raise ValueError(f"{client.base_url} does not answer: {reason}; start it, or set --base-url")
        if not is_announced:
            log.warning("%s does not answer (%s); waiting for up to %.0f s", client.base_url, reason, timeout_s)
            is_announced = True
        await asyncio.sleep(POLL_S)


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Return the seconds at which `count` requests are sent, at `rate` a second.

    The gaps have a gamma distribution of shape `burstiness`. They are scaled so that the last request is sent at
    count / rate, as in vLLM.
    """
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.ones(count)
    else:
        gaps = np.random.default_rng([seed, count]).gamma(burstiness, size=count)
    times = np.cumsum(gaps)
    return (times * (count / rate / times[-1])).tolist() if times[-1] > 0 else [0.0] * count


async def send_all(
    prompts: Sequence[DatasetPrompt], times: Sequence[float], send: Send, max_concurrency: int | None, bar: tqdm[Any]
) -> list[RequestRecord]:
    """Send each prompt at its time, or later if max_concurrency requests are in flight; returns records in order."""
    started = time.perf_counter()
    gate: AbstractAsyncContextManager[Any] = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def send_at(prompt: DatasetPrompt, at: float) -> RequestRecord:
        await asyncio.sleep(started + at - time.perf_counter())
        async with gate:
            record = await send(prompt)
        bar.update()
        return record

    return await asyncio.gather(*(send_at(prompt, at) for prompt, at in zip(prompts, times, strict=True)))
