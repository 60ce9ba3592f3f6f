"""Admission control: which requests are live, and which are refused because there are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ...comm.message_text import counted
from ..engine.async_engine import AsyncEngine
from .api_errors import ApiError
from .server_config import ServerConfig

RESERVE = 8


class AdmissionControl:
    """Counts live requests and outputs, and refuses requests above the limits of the configuration.

    A client with little may exceed them by a share of 1/RESERVE, so that one that sends as much as it can does not lock
    the others out.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self._num_requests = self._num_outputs = 0
        self._by_client: Counter[int] = Counter()  # outputs

    @contextmanager
    def admit(self, num_outputs: int, client: int) -> Iterator[None]:
        """Count a client's request as live within the block; raises ApiError if it cannot be admitted."""
        self._check(num_outputs, client)
        self._count(client, 1, num_outputs)
        try:
            yield
        finally:
            self._count(client, -1, -num_outputs)

    def _check(self, num_outputs: int, client: int) -> None:
        health = self._engine.health
        if health.state in ("draining", "failed"):
            message = f"the server takes no requests: it is {health.state}, {health.reason}"
            raise ApiError(503, message, code=health.state)
        max_num_seqs, config = self._engine.limits.max_num_seqs, self._config
        num_queued = self._num_outputs + num_outputs - max_num_seqs
        max_queued, max_requests = config.max_queued, config.max_concurrent_requests
        if self._by_client[client] + num_outputs <= max_queued // RESERVE**2:
            max_queued += max_queued // RESERVE
            max_requests += max_requests // RESERVE
        is_full = num_queued > max_queued or self._num_requests >= max_requests
        if is_full or self._engine.num_waiting > max_queued:
            load = f"{counted(self._num_requests, 'request')} with {counted(self._num_outputs, 'output')}"
            raise ApiError(429, f"the server is busy: {load}; try again later", code="rate_limit_exceeded")

    def _count(self, client: int, num_requests: int, num_outputs: int) -> None:
        self._num_requests, self._num_outputs = self._num_requests + num_requests, self._num_outputs + num_outputs
        self._by_client[client] += num_outputs
        if self._by_client[client] == 0:
            del self._by_client[client]
