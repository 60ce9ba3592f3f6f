"""The ASGI application: routes with their documented answers, the key, and every error in one envelope."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.request import RequestRefused
from ...runtime.version import __version__
from ..errors import EngineFailed
from . import page_files
from .api_errors import ApiError, ErrorReply, as_api_error
from .handlers import Handlers
from .protocol.request_models import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .protocol.response_models import ChatCompletion, Completion, Detokenized, Healthy, ModelList, Tokens, Version

REF = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": meaning}
    for status, meaning in {
        400: "Something in the request is wrong, or not implemented", 401: "No key, or an unknown one",
        404: "There is no such model", 413: "The body is too long", 429: "Busy; try again later",
        500: "A fault of the server", 503: "The engine is down, starting again or shutting down; try again later",
    }.items()
}  # fmt: skip


def create_app(gateway: Handlers, keys: Sequence[str]) -> ASGIApp:
    """The application; without keys, everybody may use it."""
    app = Described(
        title="lockstep", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers=HANDLERS,
    )  # fmt: skip
    app.with_key = bool(keys)
    for path, handler, body, reply, other in (
        ("/v1/completions", gateway.completions, CompletionRequest, Completion, "text/event-stream"),
        ("/v1/chat/completions", gateway.chat, ChatRequest, ChatCompletion, "text/event-stream"),
        ("/v1/models", gateway.models, None, ModelList, None),
        ("/tokenize", gateway.tokenize, TokenizeRequest, Tokens, None),
        ("/detokenize", gateway.detokenize, DetokenizeRequest, Detokenized, None),
        ("/health", gateway.health, None, Healthy, None),
        ("/version", gateway.version, None, Version, None),
        ("/metrics", gateway.metrics, None, None, "text/plain"),
    ):
        content: dict[str, Any] = {other: {}} if other else {}
        app.add_api_route(
            path, handler, methods=["GET" if body is None else "POST"], response_model=reply,
            response_class=Response if reply is None else JSONResponse,
            responses=ERRORS | {200: {"content": content}}, openapi_extra=_takes(body),
        )  # fmt: skip
    app.add_route("/stats", gateway.stats, include_in_schema=False)
    for path in page_files.FILES:
        app.add_route(path, page_files.send, include_in_schema=False)
    return RequireKey(app, keys)


class Described(FastAPI):
    """Adds what FastAPI cannot know: the bodies, which are read within a limit, and the key."""

    with_key: bool

    def openapi(self) -> dict[str, Any]:
        described = get_openapi(title=self.title, version=self.version, routes=self.routes)
        bodies = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
        _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=REF)
        described["components"]["schemas"] |= found["$defs"]
        if self.with_key:
            described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            described["security"] = [{"key": []}]
            described["paths"]["/health"]["get"]["security"] = []
        return described


def _takes(body: type[BaseModel] | None) -> dict[str, Any]:
    if body is None:
        return {}
    schema = {"$ref": REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class RequireKey:
    """Lets requests with one of the keys pass, and all to /health; without keys, all. Browsers have it as password."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] == "/health" or self._knows(scope):
            await self._app(scope, receive, send)
        else:
            error = ApiError(401, "this server needs a key it knows; send the header Authorization: Bearer KEY")
            response = error.response()
            response.headers["WWW-Authenticate"] = 'Basic realm="lockstep", charset="UTF-8"'  # a browser then asks
            await response(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"basic":  # of a browser: any name, and the key as the password
            key = _password(key)
        # Equal time for every key: digests of one length, and no key's comparison is left out.
        matches = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        return scheme.lower() in (b"bearer", b"basic") and any(matches)


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _on_refusal(request: Request, error: RequestRefused | EngineFailed) -> Response:
    return as_api_error(error).response()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: there is no such route, or not with this method."""
    response = ApiError(error.status_code, f"{request.method} {request.url.path[:64]}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response


async def _on_fault(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server has failed to answer; its log says why", code="internal_error").response()


async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


HANDLERS: dict[Any, Any] = {
    ApiError: _on_api_error,
    RequestRefused: _on_refusal,
    EngineFailed: _on_refusal,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_fault,
}
