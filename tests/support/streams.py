"""Streams of the server that have begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx


@contextmanager
def begun_stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """Send a completion request and wait for its first event; the block gets the iterator of the other lines.

    The iterator lives as long as the block: httpx closes the connection when it is collected.
    """
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines
