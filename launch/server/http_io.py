"""Bytes in and out: bodies read within a limit, answers that end with their client, server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...runtime.request import RequestRefused
from ..errors import EngineFailed
from .api_errors import ApiError, as_api_error, from_validation_error
from .protocol.request_models import fields_of

INLINE_BYTES = 32 * 1024  # a longer body is parsed in a thread
BODIES = 64  # of the longest length may be in memory before they are requests
Body = TypeVar("Body", bound=BaseModel)


class BodyBudget:
    """What may be in memory of bodies that are still read or parsed: `max_bytes` of one, `BODIES` times that of all."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0

    def take(self, size: int) -> None:
        """Raises ApiError when there is no room."""
        if self.held + size > BODIES * self.max_bytes:
            raise ApiError(429, "too many long bodies are read at once; try again later", code="rate_limit_exceeded")
        self.held += size


async def read_body(request: Request, model: type[Body], reading: BodyBudget) -> Body:
    """The request's JSON as `model`; raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, "the body must be JSON; send it with the header content-type: application/json")
    content = bytearray()
    try:
        await _read(request, content, reading)
        if len(content) <= INLINE_BYTES:
            return _parse(bytes(content), model)
        return await asyncio.to_thread(_parse, bytes(content), model)
    finally:
        reading.held -= len(content)


async def _read(request: Request, content: bytearray, reading: BodyBudget) -> None:
    """The body into `content`, never more of it than `reading` takes."""
    too_long = ApiError(413, f"the body is longer than the {reading.max_bytes} bytes of --max-body-bytes; send less")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > reading.max_bytes:
        raise too_long
    async for chunk in request.stream():
        if len(content) + len(chunk) > reading.max_bytes:
            raise too_long
        reading.take(len(chunk))
        content += chunk


def _parse(content: bytes, model: type[Body]) -> Body:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise from_validation_error(error, fields_of(model)) from None


class StreamingAnswer(Response):
    """An answer that is made while it is sent, and given up when its client has gone."""

    def __init__(self, work: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, gone = asyncio.ensure_future(self._work(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, reply: BaseModel) -> None:
    content = reply.model_dump_json().encode()
    await _start(send, "application/json", content_length=str(len(content)))
    await send({"type": "http.response.body", "body": content})


async def send_events(send: Send, chunks: AsyncIterator[BaseModel]) -> None:
    """Server-sent events: one for each chunk, then [DONE]. What fails before the first chunk is raised."""
    first = await anext(chunks)
    await _start(send, "text/event-stream; charset=utf-8", cache_control="no-cache", x_accel_buffering="no")
    await _send_event(send, first)
    try:
        async for chunk in chunks:
            await _send_event(send, chunk)
    except (RequestRefused, EngineFailed) as error:
        await _send_event(send, as_api_error(error).reply())
    except ApiError as error:
        await _send_event(send, error.reply())
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_event(send: Send, chunk: BaseModel) -> None:
    line = b"data: " + chunk.model_dump_json().encode() + b"\n\n"
    await send({"type": "http.response.body", "body": line, "more_body": True})


async def _start(send: Send, content_type: str, **headers: str) -> None:
    named = {"content_type": content_type, **headers}
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": 200, "headers": lines})
