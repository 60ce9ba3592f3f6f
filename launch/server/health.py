"""The engine's health: it makes steps while requests are live, or it is known to be idle."""

from __future__ import annotations

import time

from ..engine.async_engine import AsyncEngine


class Liveness:
    """Watches the engine's count of steps; `update` is called about once a second."""

    def __init__(self, engine: AsyncEngine, stall_timeout_s: float) -> None:
        self._engine, self._stall_timeout_s = engine, stall_timeout_s
        self._steps = -1
        self._progress_at = time.monotonic()  # of the last new step, or of the last update without live requests

    def update(self) -> None:
        """Note the progress since the last call."""
        stats = self._engine.stats()
        if stats.engine.steps != self._steps or stats.num_live == 0:
            self._steps, self._progress_at = stats.engine.steps, time.monotonic()

    def problem(self) -> str | None:
        """Return the reason why the server is not healthy; None if it is healthy."""
        health = self._engine.health
        if health.state != "ready":
            return f"the engine is {health.state}: {health.reason}"
        self.update()
        silent_s = time.monotonic() - self._progress_at
        if silent_s < self._stall_timeout_s:
            return None
        return f"the engine has made no step for {silent_s:.0f} s although requests are live"
