"""uvicorn's HTTP protocol with deadlines for slow clients and a limit of connections.

A request has `request_timeout_s` to arrive. Response bytes beyond the socket's write buffer of 64 KiB have
`response_timeout_s` to be read. A connection that misses a deadline is aborted, and its request is cancelled like that
of a client that disconnects. So a slow client holds neither a place in the batch nor memory.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError
from .server_config import ServerLimits

RESERVED_FILES = 256  # connections leave these descriptors free for restarted ranks and files


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to the hard limit: each connection needs a descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    """Return the number of connections that the limit of open files allows."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FILES)


class TimeoutHTTPProtocol(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, limits: ServerLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._request_timer: asyncio.TimerHandle | None = None
        self._response_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > (self._limits.max_connections or max_connections()):
            self._refuse(ApiError(503, "the server has too many connections; try again later", code="busy"))
        self._update_request_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_request_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_request_timer()
        if self.transport.get_write_buffer_size():  # the client must also read the end of the response in time
            self._start_response_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_response_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._response_timer is not None:
            self._response_timer.cancel()
            self._response_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._request_timer, self._response_timer):
            if timer is not None:
                timer.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_request"))

    def _update_request_timer(self) -> None:
        """Run the timer while a request arrives; uvicorn's keep-alive timeout covers idle connections."""
        is_arriving = self.cycle is None or self.cycle.more_body or self.cycle.response_complete
        if is_arriving and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            if self._request_timer is None:
                self._request_timer = self.loop.call_later(self._limits.request_timeout_s, self.transport.abort)
        elif self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _start_response_timer(self) -> None:
        if self._response_timer is None:
            self._response_timer = self.loop.call_later(self._limits.response_timeout_s, self._on_response_timeout)

    def _on_response_timeout(self) -> None:
        self._response_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Send the error unless a response has begun, then close the connection."""
        response = error.response()
        headers: list[tuple[bytes, bytes]] = [*response.raw_headers, (b"connection", b"close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            start, body = h11.Response(status_code=error.status, headers=headers), h11.Data(data=bytes(response.body))
            for event in (start, body, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
