"""HTTP input and output: bodies within a limit, answers that stop when the client leaves, server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ...runtime.request import RequestRefused
from ..errors import EngineFailed
from .api_errors import ApiError, as_api_error, from_validation_error
from .body_structure import MAX_ITEMS, check_structure
from .protocol.request_models import fields_of

INLINE_BYTES = 32 * 1024  # a longer body is parsed in a thread
# The sum of all long bodies that arrive in a second, in bodies of the maximum length. Reading and parsing one of 4 MiB
# takes 25 ms of the interpreter: clients that send them in a loop get a fifth of it.
LONG_BODIES_PER_S = 8
PARSER = ThreadPoolExecutor(1, "lockstep-bodies")  # one long body at a time: parsing holds the interpreter's lock
WRITER = ThreadPoolExecutor(1, "lockstep-answers")  # one long answer at a time: the event loop would stop all streams
Body = TypeVar("Body", bound=BaseModel)
Part = TypeVar("Part")
BODY_WRITER = "lockstep.body_writer"  # name of the extension


class BodyBudget:
    """The limits of a body, and the memory of those that are being read or parsed: `max_bodies` times `max_bytes`."""

    def __init__(self, max_bytes: int, max_bodies: int, max_items: int = MAX_ITEMS) -> None:
        self.max_bytes, self.max_items, self.used_bytes = max_bytes, max_items, 0
        self._total_bytes = max_bodies * max_bytes
        self._next_at = 0.0  # time.monotonic at which the next bytes of a long body may be read
        self.parse_at = 0.0  # the same for the parsing of the next long body; only for PARSER's thread

    def take(self, num_bytes: int) -> None:
        """Reserve memory; raises ApiError if there is not enough left."""
        if self.used_bytes + num_bytes > self._total_bytes:
            message = "the server is reading too many long bodies at once; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded")
        self.used_bytes += num_bytes

    async def wait_for_turn(self, num_bytes: int) -> None:
        """Wait as long as it takes to read these bytes of a long body at the rate for all of them together."""
        now = time.monotonic()
        self._next_at = max(self._next_at, now) + num_bytes / (LONG_BODIES_PER_S * self.max_bytes)
        await asyncio.sleep(self._next_at - now)


async def read_body(request: Request, model: type[Body], budget: BodyBudget) -> Body:
    """Return the request's JSON body as `model`; raises ApiError."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, "the body must be JSON; send it with the header content-type: application/json")
    too_long = ApiError(413, f"the body is longer than the {budget.max_bytes} bytes of --max-body-bytes; send less")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > budget.max_bytes:
        raise too_long
    content = bytearray()
    try:
        async for chunk in request.stream():
            if len(content) + len(chunk) > budget.max_bytes:
                raise too_long
            budget.take(len(chunk))
            content += chunk
            if len(content) > INLINE_BYTES:
                await budget.wait_for_turn(len(chunk))
        if len(content) <= INLINE_BYTES:
            return _parse(bytes(content), model)
        parse = partial(_parse_long, bytes(content), model, budget)
        return await asyncio.get_running_loop().run_in_executor(PARSER, parse)
    finally:
        budget.used_bytes -= len(content)


def _parse(content: bytes, model: type[Body]) -> Body:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise from_validation_error(error, fields_of(model)) from None


def _parse_long(content: bytes, model: type[Body], budget: BodyBudget) -> Body:
    """Parse after a pause of twice the last body's time: bodies that end together do not hold the lock in a row."""
    time.sleep(max(0.0, budget.parse_at - time.monotonic()))
    started = time.monotonic()
    try:
        check_structure(content, budget.max_items)
        return _parse(content, model)
    finally:
        budget.parse_at = time.monotonic() + 2 * (time.monotonic() - started)


class BodyWriter(Protocol):
    """An extension of the ASGI scope that writes the parts of a body of unknown length to the connection."""

    def write(self, part: bytes) -> bool:
        """Write a part, unless that is not possible now; return whether it was written."""


class DirectSend:
    """An ASGI `send` that writes the parts of a stream without passing the layers of the application and of the server.

    For a short part they take longer than its write. The head of the response passes all layers, and so does a part
    that has to wait until the client reads.
    """

    def __init__(self, send: Send, writer: BodyWriter) -> None:
        self._send, self._writer, self._is_stream = send, writer, False

    async def __call__(self, message: Message) -> None:
        if self._is_stream and message.get("more_body") and self._writer.write(message["body"]):
            return
        if message["type"] == "http.response.start":
            self._is_stream = all(name != b"content-length" for name, _ in message["headers"])
        await self._send(message)


class StreamingAnswer(Response):
    """A response that the coroutine `answer` computes and sends; it is cancelled when the client disconnects."""

    def __init__(self, answer: Callable[[Send], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (body_writer := scope.get("extensions", {}).get(BODY_WRITER)) is not None:
            send = DirectSend(send, body_writer)
        answer, disconnect = asyncio.ensure_future(self._answer(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((answer, disconnect), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            answer.cancel()
            disconnect.cancel()
            await asyncio.gather(answer, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def make_long(make: Callable[[], Part]) -> Part:
    """Return what `make` returns, a part of a long answer, called in the thread for these."""
    return await asyncio.get_running_loop().run_in_executor(WRITER, make)


async def send_json(send: Send, pieces: Sequence[bytes]) -> None:
    """Send pieces of JSON as a whole response."""
    await _start(send, "application/json", content_length=str(sum(map(len, pieces))))
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class NamedEvent(NamedTuple):
    """A server-sent event with a name, as OpenAI's Responses and Anthropic's Messages have them."""

    name: str
    data: dict[str, Any]


Chunk = bytes | NamedEvent  # bytes are JSON


async def send_events(
    send: Send, chunks: AsyncIterator[Chunk], as_events: Callable[[ApiError], Iterable[Chunk]], end: bytes
) -> None:
    """Send each chunk as a server-sent event, then the bytes `end`.

    An error before the first chunk is raised; a later one is sent as the last events, which `as_events` makes of it.
    """
    first = await anext(chunks)
    await _start(send, "text/event-stream; charset=utf-8", cache_control="no-cache", x_accel_buffering="no")
    await send(_event(first))
    try:
        async for chunk in chunks:
            await send(_event(chunk))
    except (ApiError, RequestRefused, EngineFailed) as error:
        for chunk in as_events(as_api_error(error)):
            await send(_event(chunk))
    await send({"type": "http.response.body", "body": end})


def _event(chunk: Chunk) -> Message:
    """Return a chunk as a server-sent event."""
    if isinstance(chunk, bytes):
        event = b"data: %b\n\n" % chunk
    else:
        event = b"event: %b\ndata: %b\n\n" % (chunk.name.encode(), msgspec.json.encode(chunk.data))
    return {"type": "http.response.body", "body": event, "more_body": True}


async def _start(send: Send, content_type: str, **headers: str) -> None:
    pairs = {"content_type": content_type, **headers}
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": 200, "headers": lines})
