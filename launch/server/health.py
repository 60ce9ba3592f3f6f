"""The engine's health: it makes steps while requests are live, or it is known to be idle."""

from __future__ import annotations

from ..cluster.stall_detector import StallDetector
from ..engine.async_engine import AsyncEngine


class Liveness:
    """Watches the engine's count of steps; `update` is called about once a second."""

    def __init__(self, engine: AsyncEngine, stall_timeout_s: float) -> None:
        self._engine, self._stall = engine, StallDetector(stall_timeout_s)

    def update(self) -> None:
        """Note the progress since the last call."""
        stats = self._engine.stats()
        self._stall.update(stats.engine.steps, stats.num_live)

    def problem(self) -> str | None:
        """Return the reason why the server is not healthy; None if it is healthy."""
        health = self._engine.health
        if health.state != "ready":
            return f"the engine is {health.state}: {health.reason}"
        self.update()
        problem = self._stall.problem()
        return None if problem is None else f"the engine has made {problem}"
