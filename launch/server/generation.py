"""The events of all prompts of a request as one stream, with metrics, token counts and errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from ...runtime.outputs import Event
from ...runtime.request import SamplingParams
from ..engine.async_engine import AsyncEngine
from .api_errors import ApiError
from .metrics import Metrics, PromptTimer
from .response_builders import TokenUsage

Item = TypeVar("Item")


async def generate(
    engine: AsyncEngine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    metrics: Metrics,
    usage: TokenUsage,
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield the events of all prompts as they come, each with the index of its choice in the response.

    Updates `metrics` and `usage`. Closing the generator cancels all outputs that have not ended.
    Raises ApiError when an output ends with an error, or because the server shuts down.
    """
    timers = [PromptTimer(metrics) for _ in prompts]
    streams = [engine.generate(ids, p) for ids, p in zip(prompts, params, strict=True)]
    async with aclosing(_merge(streams)) as events:
        async for prompt, event in events:
            timers[prompt].observe(event)
            usage.update(prompt, event)
            if event.finish_reason == "error":
                raise ApiError(400, str(event.stop_reason), code="structured_outputs_failed")
            if event.finish_reason == "abort":
                reason = event.stop_reason or "the server is shutting down"
                raise ApiError(503, f"the server has ended this request: {reason}", code="aborted")
            yield prompt * params[prompt].n + event.index, event


async def _merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Yield the items of all streams as they come, each with the number of its stream.

    All streams are closed when this generator is closed or when one of them fails.
    """
    if len(streams) == 1:  # the usual case, without a task and a queue
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item] | asyncio.Task[None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncGenerator[Item, None]) -> None:
        async for item in stream:
            queue.put_nowait((number, item))

    tasks = [asyncio.ensure_future(forward(i, stream)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            entry = await queue.get()
            if isinstance(entry, tuple):
                yield entry
            else:
                entry.result()  # raises the stream's exception
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
