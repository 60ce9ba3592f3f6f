"""What an answer must look like, in any of the ways to say so: OpenAI's response_format, vLLM's fields, old and new."""

from __future__ import annotations

from typing import Any

from ...runtime.request import RequestRefused
from ...runtime.structured_outputs import StructuredOutputsParams
from .api_errors import ApiError
from .protocol.request_models import Generate, ResponseFormat

OLD = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def structured_outputs(body: Generate) -> StructuredOutputsParams | None:
    """None where nothing is asked; raises ApiError naming the field."""
    asked = _asked(body)
    if len(asked) > 1:
        raise _invalid(list(asked)[-1], f"cannot be given together with {' and '.join(list(asked)[:-1])}; give one")
    for name, params in asked.items():
        try:
            return StructuredOutputsParams(**params)
        except ValueError as error:
            raise _invalid(name, str(error).partition("=")[2]) from error
    return None


def refused(error: RequestRefused, body: Generate) -> ApiError:
    """The answer when the service does not take a request: the field is known here if it is the grammar's."""
    grammar = str(error).startswith("structured_outputs=")
    return ApiError(400, str(error), param=next(iter(_asked(body)), None) if grammar else None, code="invalid_value")


def _asked(body: Generate) -> dict[str, dict[str, Any]]:
    """The fields that say something, with StructuredOutputsParams's own."""
    asked: dict[str, dict[str, Any]] = {}
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = _openai(body.response_format)
    if body.structured_outputs is not None:
        found = body.structured_outputs.model_dump(exclude_none=True, exclude={"disable_fallback"}, by_alias=True)
        asked["structured_outputs"] = found
    old = {name: getattr(body, name) for name in OLD}
    return asked | {name: {name.removeprefix("guided_"): v} for name, v in old.items() if v is not None}


def _openai(asked: ResponseFormat) -> dict[str, Any]:
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.json_schema is None:
        raise ApiError(
            400, "Missing required parameter: 'response_format.json_schema'.",
            param="response_format.json_schema", code="missing_required_parameter",
        )  # fmt: skip
    schema = asked.json_schema.schema_
    return {"json_object": True} if schema is None else {"json": schema}


def _invalid(param: str, rule: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}': it {rule}.", param=param, code="invalid_value")
