"""The EngineClient in the process of the engine, which also serves those in other processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from ...runtime.limits import Limits
from ...runtime.outputs import Event
from ...runtime.request import NO_ORIGIN, Origin, PromptFields
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ..cluster.stall_detector import StallDetector
from ..engine.async_engine import AsyncEngine
from .admission import AdmissionControl
from .engine_client import EngineStatus
from .request_metrics import RequestMetrics
from .server_config import ServerConfig, ServerLimits


class LocalEngineClient:
    """An EngineClient of an engine that has been started."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, limits: ServerLimits) -> None:
        self.engine, self.name, self.started_at = engine, engine.name, int(time.time())
        self.tokenizer, self.default_params = engine.tokenizer, engine.default_params
        self.metrics = RequestMetrics()
        self.admission = AdmissionControl(engine, config)
        self.starting = asyncio.Lock()  # of generations of other processes: each takes a turn of the loop
        self._stall_detector = StallDetector(limits.stall_timeout_s)

    @property
    def limits(self) -> Limits:
        """The limits that every request must keep."""
        return self.engine.limits

    @asynccontextmanager
    async def admit(self, num_outputs: int, client: int) -> AsyncIterator[None]:
        """Count a client's request as live within the block; raises ApiError if it cannot be admitted."""
        with self.admission.admit(num_outputs, client):
            yield

    def generate(
        self, prompt: Sequence[int] | PromptFields, params: SamplingParams, origin: Origin = NO_ORIGIN
    ) -> AsyncGenerator[Event, None]:
        """Do as AsyncEngine.generate."""
        return self.engine.generate(prompt, params, origin)

    async def check_grammar(self, params: StructuredOutputsParams) -> None:
        """Compile a constraint of outputs; raises RequestRefused if it cannot be used."""
        await self.engine.check_grammar(params)

    async def status(self) -> EngineStatus:
        """Return the engine's state."""
        stats = self.engine.stats()
        self._stall_detector.update(stats.engine.steps, stats.num_live)
        return EngineStatus(self.engine.health, stats, self._stall_detector.problem())

    async def all_metrics(self) -> RequestMetrics:
        """Return the metrics of the requests; this process is the only one that answers."""
        return self.metrics

    async def tick(self) -> None:
        """Note the engine's progress, so that a stall is reported at once."""
        await self.status()
