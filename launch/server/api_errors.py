"""API errors in the envelopes of OpenAI and Anthropic, with messages of bounded length."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.responses import Response

from ...runtime.request import RequestRefused
from ..engine.async_tokenizer import TokenizationRefused
from ..errors import EngineFailed, RequestCrashedEngine, TokenizerBusy
from .protocol.strict_model import NEUTRAL_ONLY
from .request_id import REQUEST_ID

MAX_MESSAGE = 600  # unit: characters
MAX_QUOTE = 64  # longest quote of a value from the request, in characters
FOLDERS = re.compile(r"(?<![\w/:.~-])/(?:[^\s/'\":;,()]+/)+(?=[^\s/'\":;,()])")  # of an absolute path, without its name
RETRY_AFTER_S = {429: 1, 503: 5}
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
RESPONSES_PARAMS = {  # fields of a chat by their names in the Responses API
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"
}  # fmt: skip
BOUND_CODES = dict.fromkeys(("le", "lt"), "above_max_value") | dict.fromkeys(("ge", "gt"), "below_min_value")
CONTEXT_EXCEEDED = "context_length_exceeded"
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """Anthropic's error envelope."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str


class ApiError(Exception):
    """An error response; `param` is the request field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or CODES.get(status)

    def reply(self) -> ErrorReply:
        """Return the body of the response."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return ErrorReply(error=ErrorDetail(message=self._message(), type=kind, param=self.param, code=self.code))

    def anthropic_reply(self) -> AnthropicErrorReply:
        """Return the body of the response in Anthropic's envelope."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        detail = AnthropicErrorDetail(type=kind, message=self._anthropic_message())
        return AnthropicErrorReply(error=detail, request_id=REQUEST_ID.get())

    def _anthropic_message(self) -> str:
        """Return the message for Anthropic's clients, which know a prompt that is too long by these words."""
        return f"prompt is too long: {self._message()}" if self.code == CONTEXT_EXCEEDED else self._message()

    def _message(self) -> str:
        text = without_folders(str(self)) if self.status >= 500 else str(self)  # others quote the client's own text
        return shorten(text, MAX_MESSAGE)

    def response(self, path: str = "") -> Response:
        """Return the HTTP response with its headers, in the envelope of the API that `path` belongs to."""
        headers = {"retry-after": str(RETRY_AFTER_S[self.status])} if self.status in RETRY_AFTER_S else {}
        if self.code == "request_ends_ranks":
            headers["x-should-retry"] = "false"  # OpenAI's clients would retry after a 500
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 500:
            headers["connection"] = "close"  # uvicorn closes after an exception
        if path.startswith("/v1/messages"):
            return Response(self.anthropic_reply().model_dump_json(), self.status, headers, "application/json")
        reply = self.reply()
        if path == "/v1/responses":
            reply.error.param = RESPONSES_PARAMS.get(self.param or "", self.param)
        return Response(reply.model_dump_json(), self.status, headers, "application/json")


class ContextExceeded(ApiError):
    """The response to a prompt, or a prompt and an output, that does not fit into the context.

    param        the field of the prompt
    num_prompt   number of prompt tokens, of which `max_input` may be
    num_output   longest output that the request asks for, in tokens; None if it asks for no length
    max_total    longest prompt and output together, in tokens
    """

    def __init__(self, param: str, num_prompt: int, num_output: int | None, max_input: int, max_total: int) -> None:
        message = (
            f"This model's maximum context length is {max_total} tokens, at most {max_input} in a prompt. However, you"
            f" requested {num_prompt} in the {param} and {num_output or 'at least 1'} in the completion; send or ask"
            " for less."
        )
        super().__init__(400, message, param=param, code=CONTEXT_EXCEEDED)
        self._num_prompt, self._num_output = num_prompt, num_output
        self._max_input, self._max_total = max_input, max_total

    def _anthropic_message(self) -> str:
        """Return the message of Anthropic's API, from which its clients read the numbers and how to go on."""
        if self._num_prompt > self._max_input:
            return f"prompt is too long: {self._num_prompt} tokens > {self._max_input} maximum"
        sizes = f"{self._num_prompt} + {self._num_output or 1} > {self._max_total}"
        way_out = "decrease input length or `max_tokens` and try again"
        return f"input length and `max_tokens` exceed context limit: {sizes}, {way_out}"


def without_folders(text: str) -> str:
    """Return `text` with absolute paths reduced to their last names: clients need not know the server's folders."""
    return FOLDERS.sub("", text)


def invalid(param: str, rule: str) -> ApiError:
    """Return the error for a field with a value that breaks `rule`, the predicate of "it ..."."""
    return ApiError(400, f"Invalid '{param}': it {rule}.", param=param, code="invalid_value")


def missing(param: str) -> ApiError:
    """Return the error for a field that is required."""
    return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def as_api_error(error: ApiError | RequestRefused | EngineFailed | TokenizerBusy) -> ApiError:
    """Return the response to a request that the server or the engine refuses, or that the engine cannot finish."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestCrashedEngine):
        return ApiError(500, str(error), code="request_ends_ranks")
    if isinstance(error, EngineFailed):
        return ApiError(503, f"the engine has failed: {error}", code="engine_failed")
    if isinstance(error, TokenizerBusy):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, TokenizationRefused):
        return ApiError(400, str(error), param=error.param, code=error.code)
    return ApiError(400, str(error), code="invalid_value")


def from_validation_error(error: ValidationError, fields: dict[str, FieldInfo]) -> ApiError:
    """Return the response to the first error of a body; `fields` are those of its model and of the nested models."""
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    path, field = _locate(first["loc"], fields)
    description = field.description if field is not None else None
    if kind in ("unknown_parameter", "unsupported_parameter") and not description:
        name = shorten(context["name"], MAX_QUOTE)
        path = f"{path}.{name}" if path else name
        if kind == "unknown_parameter":
            return ApiError(400, f"Unknown parameter: '{path}'.", param=path, code=kind)
        return _unsupported(path)
    if kind == "missing_content":
        return missing(f"{path}.content")
    if kind == "json_invalid" or path is None:
        return ApiError(400, f"the body is not valid for this route: {first['msg']}", code="invalid_json")
    if field is not None and NEUTRAL_ONLY in field.metadata:
        return _unsupported(path)
    if kind == "missing" and not (description and len(error.errors()) > 1):
        return missing(path)
    rule = f"expected {description}" if description else first["msg"]
    if isinstance(value, dict) and isinstance(value.get("type"), str):  # a part of the input, or a tool
        value = value["type"]
    if isinstance(value, (str, int, float)):
        rule += f", but got {shorten(repr(value), MAX_QUOTE)}"
    return ApiError(400, f"Invalid '{path}': {rule}.", param=path, code=_code(kind, context))


def shorten(text: str, max_length: int) -> str:
    """Return `text`, cut to `max_length` characters with an ellipsis if it is longer."""
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def _unsupported(path: str) -> ApiError:
    message = f"Unsupported parameter: '{path}' is not implemented here with this value; leave it out."
    return ApiError(400, message, param=path, code="unsupported_parameter")


def _locate(loc: tuple[int | str, ...], fields: dict[str, FieldInfo]) -> tuple[str | None, FieldInfo | None]:
    """Return the path as `messages[0].content`, without names of union members, and the innermost field."""
    path, field, parent = "", None, ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif (name := f"{parent}.{step}" if parent else step) in fields:
            path, field, parent = f"{path}.{step}" if path else step, fields[name], step
            if field.description or NEUTRAL_ONLY in field.metadata:  # the description or mark covers all nested fields
                break
    return (path, field) if loc else (None, None)


def _code(kind: str, limits: dict[str, Any]) -> str:
    """Return OpenAI's code for a kind of pydantic error; `limits` holds the bound that the value breaks."""
    for bound, suffix in BOUND_CODES.items():
        if bound in limits:
            return f"{'decimal' if isinstance(limits[bound], float) else 'integer'}_{suffix}"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"
