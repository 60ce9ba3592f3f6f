"""The engine as the handlers of HTTP requests see it, in their process or in another one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from ...runtime.limits import Limits
from ...runtime.outputs import Event
from ...runtime.request import NO_ORIGIN, Origin, PromptFields
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ..engine.async_tokenizer import AsyncTokenizer
from ..engine.engine_state import AsyncEngineStats, Health
from .request_metrics import RequestMetrics


class EngineStatus(msgspec.Struct, frozen=True):
    """The engine's state, its statistics, and a description of its stall if there is one."""

    health: Health
    stats: AsyncEngineStats
    stall: str | None


class EngineClient(Protocol):
    """The engine, and what all processes of a server share: admission, status and metrics.

    Each method may raise EngineFailed.
    """

    name: str
    started_at: int  # Unix time
    tokenizer: AsyncTokenizer
    default_params: SamplingParams
    metrics: RequestMetrics  # of the requests of this process

    @property
    def limits(self) -> Limits:
        """The limits that every request must keep."""

    def admit(self, num_outputs: int, client: int) -> AbstractAsyncContextManager[None]:
        """Count a client's request as live within the block; raises ApiError if it cannot be admitted."""

    def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        """Do as AsyncEngine.generate."""

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint of outputs; raises RequestRefused if it cannot be used."""

    async def status(self) -> EngineStatus:
        """Return the engine's state."""

    async def all_metrics(self) -> RequestMetrics:
        """Return the metrics of the requests of all processes."""

    async def tick(self) -> None:
        """Do what is due once a second."""
