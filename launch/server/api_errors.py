"""What goes wrong, as OpenAI says it: one envelope for every status, with bounded text whatever was sent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from starlette.responses import Response

from ...runtime.request import RequestRefused
from ..engine.async_tokenizer import TokenizationRefused
from ..errors import EngineFailed, RequestCrashedEngine

LONGEST_MESSAGE = 600  # characters
LONGEST_ECHO = 64  # of what was sent, in a message
RETRY_AFTER_S = {429: 1, 503: 5}
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class Unsupported:
    """Marks a field that others implement and this server does not: only the values that change nothing are taken."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's envelope."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 200; `param` is the field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or CODES.get(status)

    def reply(self) -> ErrorReply:
        message = shortened(str(self), LONGEST_MESSAGE)
        kind = TYPES.get(self.status, "invalid_request_error")
        return ErrorReply(error=ErrorDetail(message=message, type=kind, param=self.param, code=self.code))

    def response(self) -> Response:
        headers = {"retry-after": str(RETRY_AFTER_S[self.status])} if self.status in RETRY_AFTER_S else {}
        if self.code == "request_ends_ranks":
            headers["x-should-retry"] = "false"  # OpenAI's clients try again after a 500
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (413, 500):
            headers["connection"] = "close"  # the rest of the body is not read; uvicorn closes after an exception
        return Response(self.reply().model_dump_json(), self.status, headers, "application/json")


def as_api_error(error: RequestRefused | EngineFailed) -> ApiError:
    """What to answer when the service does not take a request, or cannot finish it."""
    if isinstance(error, RequestCrashedEngine):
        return ApiError(500, str(error), code="request_ends_ranks")
    if isinstance(error, EngineFailed):
        return ApiError(503, f"the engine has failed: {error}", code="engine_failed")
    if isinstance(error, TokenizationRefused):
        return ApiError(400, str(error), param=error.param, code="too_complex" if error.timed_out else "invalid_value")
    return ApiError(400, str(error), code="invalid_value")


def from_value_error(error: ValueError, fields: dict[str, FieldInfo]) -> ApiError:
    """A refusal by SamplingParams, which begins with the parameter's name."""
    name = str(error).partition("=")[0].partition("[")[0]
    return ApiError(400, str(error), param=name if name in fields else None, code="invalid_value")


def from_validation_error(error: ValidationError, fields: dict[str, FieldInfo]) -> ApiError:
    """The first thing that is wrong with a body; `fields` are those of all models that it may be made of."""
    first = error.errors(include_url=False)[0]
    kind, value, limits = first["type"], first["input"], first.get("ctx", {})
    path, field = _place(first["loc"], fields)
    if kind == "json_invalid" or path is None:
        return ApiError(400, f"the body is not what this route takes: {first['msg']}", code="invalid_json")
    if kind == "extra_forbidden" and not (field and field.description):
        name = shortened(str(first["loc"][-1]), LONGEST_ECHO)
        path = f"{path}.{name}" if path else name
        return ApiError(400, f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    if field is not None and _is_unsupported(field):
        message = f"Unsupported parameter: '{path}' is not implemented here with this value; leave it out."
        return ApiError(400, message, param=path, code="unsupported_parameter")
    if kind == "missing" and not (field and field.description and len(error.errors()) > 1):
        return ApiError(400, f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    rule = f"expected {field.description}" if field and field.description else first["msg"]
    if isinstance(value, (str, int, float)):
        rule += f", but got {shortened(repr(value), LONGEST_ECHO)}"
    return ApiError(400, f"Invalid '{path}': {rule}.", param=path, code=_code(kind, limits))


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _place(loc: tuple[int | str, ...], fields: dict[str, FieldInfo]) -> tuple[str | None, FieldInfo | None]:
    """Where in the body, as `messages[0].content`, and the innermost field; names of union members are left out."""
    path, field, parent = "", None, ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        elif (name := f"{parent}.{step}") in fields or (name := step) in fields:
            path, field, parent = f"{path}.{step}" if path else step, fields[name], step
            if field.description or _is_unsupported(field):  # all that may be inside is said of the whole
                break
    return (path, field) if loc else (None, None)


def _is_unsupported(field: FieldInfo) -> bool:
    return any(isinstance(mark, Unsupported) for mark in field.metadata)


def _code(kind: str, limits: dict[str, Any]) -> str:
    for name, end in (
        ("le", "above_max_value"),
        ("lt", "above_max_value"),
        ("ge", "below_min_value"),
        ("gt", "below_min_value"),
    ):
        if name in limits:
            return f"{'decimal' if isinstance(limits[name], float) else 'integer'}_{end}"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"
