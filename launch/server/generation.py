"""The events of all prompts of a request as one stream, with metrics, token counts and errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ...runtime.outputs import Event
from ...runtime.request import SamplingParams
from ..engine.async_engine import AsyncEngine
from ..engine.merge_generators import merge
from .api_errors import ApiError
from .metrics import Metrics, PromptTimer
from .response_builders import TokenUsage


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
    async with aclosing(merge(streams)) as events:
        async for prompt, event in events:
            timers[prompt].observe(event)
            usage.update(prompt, event)
            if event.finish_reason == "error":
                raise ApiError(400, str(event.stop_reason), code="structured_outputs_failed")
            if event.finish_reason == "abort":
                reason = event.stop_reason or "the server is shutting down"
                raise ApiError(503, f"the server has ended this request: {reason}", code="aborted")
            yield prompt * params[prompt].n + event.index, event
