"""Admission of requests: refused while the engine is down, or while too many are live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..engine.async_engine import AsyncEngine
from .api_errors import ApiError
from .server_config import ServerConfig


class Admission:
    """The number of live requests and outputs, held below the limits of the configuration."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self._num_requests = self._num_outputs = 0

    @contextmanager
    def admit(self, num_outputs: int) -> Iterator[None]:
        """Count a request as live within the block; raises ApiError if it cannot be admitted."""
        self._check(num_outputs)
        self._num_requests, self._num_outputs = self._num_requests + 1, self._num_outputs + num_outputs
        try:
            yield
        finally:
            self._num_requests, self._num_outputs = self._num_requests - 1, self._num_outputs - num_outputs

    def _check(self, num_outputs: int) -> None:
        health = self._engine.health
        if health.state in ("draining", "failed"):
            message = f"the server takes no requests: it is {health.state}, {health.reason}"
            raise ApiError(503, message, code=health.state)
        num_queued = self._num_outputs + num_outputs - self._engine.limits.max_num_seqs
        is_full = max(num_queued, self._engine.stats().waiting) > self._config.max_queued
        if is_full or self._num_requests >= self._config.max_concurrent_requests:
            load = f"{self._num_requests} requests with {self._num_outputs} outputs"
            raise ApiError(429, f"the server is busy: {load}; try again later", code="rate_limit_exceeded")
