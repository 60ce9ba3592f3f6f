"""What the requests of the Responses and the Messages API have in common, and the fields of chats that they become."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from .strict_model import StrictModel

ChatFields = dict[str, Any]  # fields of a ChatRequest, or of one of its messages


class InputModel(StrictModel):
    """A part of the input; clients send back what they got, with null for each field that they know."""

    @model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                raise PydanticCustomError("unknown_parameter", "unknown field", {"name": name})
        return self


def as_texts(value: Any) -> Any:
    """Return a list with one text for a string, and other values as they are."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def type_of(value: Any) -> Any:
    """Return the field `type` of a body's part, or of its model."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def tool_fields(name: str, description: str | None, parameters: Any, strict: bool | None) -> ChatFields:
    """Return a tool of a chat."""
    function = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": function}


def call_fields(call_id: str, name: str, arguments: str) -> ChatFields:
    """Return a call in a message of a chat."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def choice_fields(name: str) -> ChatFields:
    """Return the choice of one tool."""
    return {"type": "function", "function": {"name": name}}


def format_fields(schema: ChatFields) -> ChatFields:
    """Return the `response_format` of a JSON schema, given with its name and other fields."""
    return {"type": "json_schema", "json_schema": {"name": "answer", **schema}}
