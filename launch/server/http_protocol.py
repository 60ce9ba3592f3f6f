"""uvicorn's protocol, with a deadline wherever it would wait for a client for ever, and room for a number of clients.

A client may be slow: its request has `REQUEST_S` to arrive, and what has been written to it `ANSWER_S` to be taken, as
far as it does not fit into the buffer of 64 KiB. An answer that nobody takes is cancelled like that of a client that
has gone, so that it holds neither a place nor memory.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .api_errors import ApiError

REQUEST_S = 60.0  # from the first byte, or the connection, to the last byte of the request
ANSWER_S = 60.0  # for a client to take what waits for it
RESERVE = 256  # descriptors that connections leave to everything else: ranks that start again, files


def allow_descriptors() -> None:
    """Raise this process's limit of open files to what it may be: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_connections() -> int:
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE)


class TimeoutHTTPProtocol(H11Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._request_due: asyncio.TimerHandle | None = None
        self._answer_due: asyncio.TimerHandle | None = None
        if len(self.connections) > most_connections():
            self._refuse(ApiError(503, "the server has too many connections; try again later", code="busy"))
        self._watch_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()
        if self.transport.get_write_buffer_size():  # a client that takes the end does not keep the connection either
            self._watch_answer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_answer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answer_due is not None:
            self._answer_due.cancel()
            self._answer_due = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._request_due, self._answer_due):
            if timer is not None:
                timer.cancel()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, code="invalid_request"))

    def _watch_request(self) -> None:
        """Set the deadline while a request is on its way, from uvicorn's own for idle connections onwards."""
        arriving = self.cycle is None or self.cycle.more_body or self.cycle.response_complete
        if arriving and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            if self._request_due is None:
                self._request_due = self.loop.call_later(REQUEST_S, self.transport.abort)
        elif self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None

    def _watch_answer(self) -> None:
        if self._answer_due is None:
            self._answer_due = self.loop.call_later(ANSWER_S, self._give_up_answer)

    def _give_up_answer(self) -> None:
        self._answer_due = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer with the error if an answer has not begun yet, and close."""
        response = error.response()
        body = bytes(response.body)
        headers: list[tuple[bytes, bytes]] = [*response.raw_headers, (b"connection", b"close")]
        events: list[Any] = [
            h11.Response(status_code=error.status, headers=headers), h11.Data(data=body), h11.EndOfMessage()
        ]  # fmt: skip
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
