"""The id of a request: the value of its header X-Request-Id, or a new one.

Anthropic's clients look for it in the header Request-Id and in errors.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

VALID_ID = re.compile(rb"[!-~]{1,128}")
REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="-")  # the id of the request that a task answers


class RequestIds:
    """Notes the id of each request, and adds the headers X-Request-Id and Request-Id to its response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent if VALID_ID.fullmatch(sent) else secrets.token_hex(16).encode()
        REQUEST_ID.set(request_id.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = ((name, request_id) for name in (b"x-request-id", b"request-id"))
                message["headers"] = [*message.get("headers", ()), *ids]
            await send(message)

        await self._app(scope, receive, send_with_id)
