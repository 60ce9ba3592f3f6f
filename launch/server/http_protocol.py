"""uvicorn's HTTP protocol with deadlines for slow clients, half-closed connections and a limit of connections.

A request has `request_timeout_s` to arrive; later it is refused with 408. Response bytes beyond the socket's write
buffer of 64 KiB have `response_timeout_s` to be read. A connection that misses this deadline is aborted, and its
request is cancelled like that of a client that disconnects. So a slow client holds no place in the batch and no memory.

A client that has closed its side after the request gets its answer. A response that comes before the end of the body
is the last one of its connection, which a LingeringTransport ends.
"""

from __future__ import annotations

import asyncio
import re
import resource
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError
from .http_io import BODY_WRITER
from .lingering_transport import LingeringTransport
from .server_config import ServerLimits

PROBE_S = (0.05, 1.0)  # times between the first two probes of a half-closed connection, and between later ones
SHUT_DOWN = ApiError(503, "the server has shut down", code="draining")
# The beginning of a line between the chunks of a body, or behind the last one: a length, or trailer fields.
CHUNK_LINE = re.compile(rb"\r?|[0-9A-Fa-f]{1,20}[ \t]*(;.*|\r)?|[!#$%&'*+.^_`|~0-9A-Za-z-]+(:.*)?", re.DOTALL)
RESERVED_FILES = 256  # connections leave these descriptors free for restarted ranks and files
MAX_EXCESS = 128  # connections beyond the limit that may linger
SHUTDOWN_LINGER_S = 1.5  # at the end of the server, below SHUTDOWN_S; before, a connection has response_timeout_s


def max_connections() -> int:
    """Return the number of connections that the limit of open files allows."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_FILES)


class ChunkedBody:
    """The body of a streamed response: writes its parts as chunks of HTTP/1.1, as h11 would."""

    def __init__(self, protocol: TimeoutHTTPProtocol) -> None:
        self._transport, self._flow, self._cycle = protocol.transport, protocol.flow, protocol.cycle
        self._is_chunked = self._cycle.scope["http_version"] == "1.1"

    def write(self, part: bytes) -> bool:
        """Write a part of at least one byte, unless the client must read first; return whether it was written."""
        if self._flow.write_paused or self._cycle.disconnected or not (self._is_chunked and part):
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True


class TimeoutHTTPProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self, *args: Any, limits: ServerLimits, on_close: Callable[[], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._app, self.app = self.app, self._run_app
        self._limits, self._on_close = limits, on_close
        self._request_timer: asyncio.TimerHandle | None = None
        self._response_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None
        self._is_half_closed = False  # by the client
        self._lingering: LingeringTransport  # is `transport`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = LingeringTransport(transport, self._may_send, self._limits.response_timeout_s)
        super().connection_made(cast(asyncio.Transport, self._lingering))
        num_excess = len(self.connections) - (self._limits.max_connections or max_connections())
        if num_excess > 0:
            self._refuse(ApiError(503, "the server has too many connections; try again later", code="busy"))
        if num_excess > MAX_EXCESS:
            self.transport.abort()
        self._update_request_timer()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self.conn.their_state is h11.MUST_CLOSE:
            self._lingering.drop(data)
        else:
            super().data_received(data)
            self._update_request_timer()

    def handle_events(self) -> None:
        super().handle_events()
        is_chunked = self._has_body() and self._has_header(b"transfer-encoding")
        if is_chunked and not CHUNK_LINE.fullmatch(self._unread()):
            self.send_400_response("the body has a chunk without its length")  # h11 would wait for the line's end

    def _should_upgrade(self) -> bool:
        """Serve a request for another protocol, such as WebSocket, as plain HTTP."""
        return False

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with the application, which may write its body directly."""
        is_sized_or_old = self._has_header(b"content-length") or scope["http_version"] != "1.1"
        if is_sized_or_old and self._has_header(b"transfer-encoding"):  # a proxy may find another end of the body
            self.send_400_response("transfer-encoding needs HTTP/1.1 and excludes content-length")
            return
        if self._has_body():
            send = partial(self._send_early, send)
        scope["extensions"] = {**scope.get("extensions", {}), BODY_WRITER: ChunkedBody(self)}
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # at the end of the server, for example a refusal that waits
            self._refuse(SHUT_DOWN)

    async def _send_early(self, send: Send, message: Message) -> None:
        """Send a message of a response; one before the end of the body says that the connection ends after it."""
        if message["type"] == "http.response.start" and self._has_body():
            message = {**message, "headers": [*message["headers"], CLOSE_HEADER]}
        await send(message)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open if a whole request has arrived and is not answered."""
        self._is_half_closed = True
        if self.transport.is_closing() or self.cycle is None or self.cycle.more_body or self.cycle.response_complete:
            self.transport.close()
            return False  # if it lingers, it ends now
        self._probe(PROBE_S[0])
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_half_closed and self.cycle.response_complete:  # no other request was sent before the end
            self.transport.close()
        elif self._is_arriving():  # the next request
            self._unset_keepalive_if_required()
        self._update_request_timer()

    def shutdown(self) -> None:
        """Begin to end the connection with the server: refuse a request that has not arrived."""
        self._lingering.shorten(SHUTDOWN_LINGER_S)
        if self._is_arriving():
            self._refuse(SHUT_DOWN)
        elif not self.transport.is_closing():
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._response_timer = self.loop.call_later(self._limits.response_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._response_timer is not None:
            self._response_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lingering.cancel_timer()
        for timer in (self._request_timer, self._response_timer, self._probe_timer):
            if timer is not None:
                timer.cancel()
        if self._on_close is not None:
            self._on_close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_request"))

    def _update_request_timer(self) -> None:
        """Run the timer while a request arrives; uvicorn's keep-alive timeout covers idle connections."""
        is_arriving = self.cycle is None or self.cycle.more_body or self.cycle.response_complete
        if is_arriving and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            if self._request_timer is None:
                self._request_timer = self.loop.call_later(self._limits.request_timeout_s, self._on_request_timeout)
        elif self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _on_request_timeout(self) -> None:
        """Refuse the part of a request that has arrived; a connection without one is idle, as browsers open some."""
        self._request_timer = None
        if self._is_arriving():
            message = f"the request has not arrived within {self._limits.request_timeout_s:g} s"
            self._refuse(ApiError(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _may_send(self) -> bool:
        """Return whether the client may send more than the request that has been answered."""
        is_complete = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED) and not self._unread()
        return not (is_complete or self._is_half_closed)

    def _is_arriving(self) -> bool:
        """Return whether a part of a request has arrived, and the connection is not being closed."""
        has_part = self._has_body() or (self.conn.their_state is h11.IDLE and bool(self._unread()))
        return has_part and not self.transport.is_closing()

    def _has_body(self) -> bool:
        """Return whether a part of the request's body has not been read."""
        return self.conn.their_state is h11.SEND_BODY

    def _has_header(self, name: bytes) -> bool:
        """Return whether the last request has this header; the name is in lower case."""
        return any(name == other for other, _ in self.headers)

    def _unread(self) -> bytes:
        """Return what has arrived of a line or of a head that is not complete."""
        return bytes(self.conn.trailing_data[0])

    def _probe(self, next_s: float) -> None:
        """Send a few bytes before the response: if the client is gone, the kernel says so at the next write.

        A client that has closed its side and one that is gone look the same until then.
        """
        cycle = self.cycle
        if cycle.response_complete or self.transport.is_closing():
            return
        if not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        self._probe_timer = self.loop.call_later(next_s, self._probe, PROBE_S[1])

    def _refuse(self, error: ApiError) -> None:
        """Send the error unless a response has begun, then close the connection; the app's own response is dropped."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = error.response()
        headers = [*response.raw_headers, CLOSE_HEADER]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            reason, body = HTTPStatus(error.status).phrase.encode(), bytes(response.body)
            if self.conn.our_state is h11.SEND_RESPONSE and self.cycle.scope["method"] == "HEAD":
                body = b""
            start = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
