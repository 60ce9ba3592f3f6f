"""The ASGI application: the routes with their documentation, the page, the API key, and the responses to errors."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ...runtime.request import RequestRefused
from ...runtime.version import __version__
from ..errors import EngineFailed, TokenizerBusy
from .api_errors import AnthropicErrorReply, ApiError, ErrorReply, as_api_error
from .handlers import Handlers
from .host_check import check_origin
from .protocol import reply_models as api
from .protocol.anthropic_models import CountTokensRequest, MessagesRequest
from .protocol.request_models import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .protocol.responses_models import ResponsesRequest
from .refusal_pacing import RefusalPacing
from .request_id import RequestIds
from .server_config import ServerConfig

REF = "#/components/schemas/{model}"
PAGE = Path(__file__).parent / "page"  # a chat, and a live view of the engine
PAGE_FILES = {f"/{path.relative_to(PAGE)}": path for path in sorted(PAGE.rglob("*.*"))} | {"/": PAGE / "index.html"}
PAGE_HEADERS = {  # the page loads nothing from other hosts, and no other page shows it in a frame
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": meaning}
    for status, meaning in {
        400: "The request is invalid, or asks for something that is not implemented",
        401: "The API key is missing or unknown", 403: "The Host header names another server",
        404: "The model does not exist", 413: "The body is too long",
        429: "The server is busy; try again later", 500: "The server failed",
        503: "The engine is down, restarting or shutting down; try again later",
    }.items()
}  # fmt: skip
HANDLED = (ApiError, RequestRefused, EngineFailed, TokenizerBusy, HTTPException, ClientDisconnect, Exception)


def create_app(handlers: Handlers, config: ServerConfig) -> ASGIApp:
    """Return the application; without API keys, it serves everyone."""
    keys = config.api_key or []
    app = DocumentedApp(
        title="lockstep", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        exception_handlers=dict.fromkeys(HANDLED, _on_error),
    )  # fmt: skip
    app.has_keys = bool(keys)
    for path, handler, body, reply, other_content in (
        ("/v1/completions", handlers.completions, CompletionRequest, api.Completion, "text/event-stream"),
        ("/v1/chat/completions", handlers.chat, ChatRequest, api.ChatCompletion, "text/event-stream"),
        ("/v1/responses", handlers.responses, ResponsesRequest, None, "text/event-stream"),
        ("/v1/messages", handlers.messages, MessagesRequest, None, "text/event-stream"),
        ("/v1/messages/count_tokens", handlers.count_tokens, CountTokensRequest, api.InputTokens, None),
        ("/v1/models", handlers.models, None, api.ModelList, None),
        ("/v1/models/{name:path}", handlers.model, None, api.Model, None),
        ("/tokenize", handlers.tokenize, TokenizeRequest, api.Tokens, None),
        ("/detokenize", handlers.detokenize, DetokenizeRequest, api.Detokenized, None),
        ("/tokenizer_info", handlers.tokenizer_info, None, None, None),
        ("/health", handlers.health, None, api.Healthy, None),
        ("/version", handlers.version, None, api.Version, None),
        ("/metrics", handlers.metrics, None, None, "text/plain"),
    ):
        content: dict[str, Any] = {other_content: {}} if other_content else {}
        if reply is None and other_content != "text/plain":
            content["application/json"] = {"schema": {"type": "object"}}
        app.add_api_route(
            path, handler, methods=["GET" if body is None else "POST"], response_model=reply,
            response_class=Response if reply is None else JSONResponse,
            responses=_errors(path) | {200: {"content": content}}, openapi_extra=body and _body_schema(body),
        )  # fmt: skip
    app.add_route("/stats", handlers.stats, include_in_schema=False)
    for path in PAGE_FILES:
        app.add_route(path, _send_page_file, include_in_schema=False)
    return RefusalPacing(RequestIds(check_origin(AnswerHead(RequireKey(app, keys)), config)))


async def _send_page_file(request: Request) -> Response:
    return FileResponse(PAGE_FILES[request.url.path], headers=PAGE_HEADERS)


class DocumentedApp(FastAPI):
    """Adds to /openapi.json what FastAPI cannot know: the bodies, which the handlers read, and the API key."""

    has_keys: bool

    def openapi(self) -> dict[str, Any]:
        schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
        bodies = (
            CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest, CountTokensRequest, TokenizeRequest,
            DetokenizeRequest,
        )  # fmt: skip
        _, models = models_json_schema([(body, "validation") for body in bodies], ref_template=REF)
        schema["components"]["schemas"] |= models["$defs"]
        if self.has_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            schema["paths"]["/health"]["get"]["security"] = []
        return schema


def _errors(path: str) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of the errors of a route, in the envelope of its API."""
    if not path.startswith("/v1/messages"):
        return ERRORS
    return {status: error | {"model": AnthropicErrorReply} for status, error in ERRORS.items()}


def _body_schema(body: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class AnswerHead:
    """Answers HEAD as GET; uvicorn leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "method": "GET"} if scope["method"] == "HEAD" else scope, receive, send)


class RequireKey:
    """Passes requests that carry one of the keys, and all requests to /health; without keys, passes everything.

    A browser sends the key as the password of HTTP basic authentication, Anthropic's clients as x-api-key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] == "/health" or self._note_key(scope):
            await self._app(scope, receive, send)
        else:
            error = ApiError(401, "this server needs a valid API key; send the header Authorization: Bearer KEY")
            response = error.response(scope["path"])
            response.headers["WWW-Authenticate"] = 'Basic realm="lockstep", charset="UTF-8"'  # so browsers prompt
            await response(scope, receive, send)

    def _note_key(self, scope: Scope) -> bool:
        """Return whether the request has a key, and note its index in request.state."""
        headers = dict(scope["headers"])
        authorization = headers.get(b"authorization") or b"Bearer " + headers.get(b"x-api-key", b"")
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() == b"basic":  # browsers send any user name, and the key as the password
            key = _password(key)
        # Takes equal time for every key: digests have one length, and no comparison is left out.
        matches = [hmac.compare_digest(_digest(key.strip()), digest) for digest in self._digests]
        if scheme.lower() not in (b"bearer", b"basic") or not any(matches):
            return False
        scope.setdefault("state", {})["key_index"] = matches.index(True)
        return True


def _password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _on_error(request: Request, error: Exception) -> Response:
    """Answer an error of a handler, or Starlette's for an unknown route or a method that a route does not have."""
    path = request.url.path
    match error:
        case ApiError() | RequestRefused() | EngineFailed() | TokenizerBusy():
            return as_api_error(error).response(path)
        case HTTPException():
            response = ApiError(error.status_code, f"{request.method} {path[:64]}: {error.detail}").response(path)
            response.headers.update(error.headers or {})
            return response
        case ClientDisconnect():
            return Response(status_code=400)  # no client is left to read it
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error").response(path)
