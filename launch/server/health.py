"""Whether the engine is alive: it makes steps while there is work, or it is known to be idle."""

from __future__ import annotations

import time

from ..engine.async_engine import AsyncEngine

STALL_S = 30.0  # live requests without a step; the executor gives up a step by itself after --step-timeout


class Liveness:
    """Watches the engine's count of steps; `look` is called every second or so."""

    def __init__(self, service: AsyncEngine) -> None:
        self._service = service
        self._steps = -1
        self._moved = time.monotonic()  # when a step had been made, or there was nothing to do

    async def look(self) -> None:
        self._look()

    def _look(self) -> None:
        stats = self._service.stats()
        if stats.engine.steps != self._steps or stats.num_live == 0:
            self._steps, self._moved = stats.engine.steps, time.monotonic()

    def trouble(self) -> str | None:
        """Why the server is not healthy; None if it is."""
        health = self._service.health
        if health.state != "ready":
            return f"the engine is {health.state}: {health.reason}"
        self._look()
        silent = time.monotonic() - self._moved
        if silent < STALL_S:
            return None
        return f"the engine has made no step for {silent:.0f} s although requests are live"
