"""The messages and the tools of a chat, as OpenAI's API has them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from ....runtime.chat.tool_schemas import ToolSchema
from ....runtime.chat_template import Message
from .strict_model import NEUTRAL_ONLY, StrictModel

MAX_TOOLS = 1024
MAX_CALLS = 1024  # in one message

ToolName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$", description="1 to 128 letters, digits, or characters of _ . : / -")
]


class TextPart(StrictModel):
    """A text in a list of parts; `cache_control` is taken and has no effect."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class FunctionCall(StrictModel):
    """A call with its arguments as JSON text, as models return them."""

    name: Annotated[str, Field(max_length=256)]
    arguments: str


class AssistantToolCall(StrictModel):
    """A call in a message of the assistant."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the call for a chat template, with its arguments as an object if they are one."""
        arguments: Any = self.function.arguments
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            arguments = parsed
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class ChatMessage(StrictModel):
    """One message of a conversation."""

    UNSUPPORTED: ClassVar = frozenset({"audio", "function_call", "refusal"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)] | None,
        Field(description="a string or a list of text parts; images and audio are not implemented"),
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[AssistantToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0), NEUTRAL_ONLY] = None

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role != "assistant":
            if self.content is None or self.content == []:
                raise PydanticCustomError("missing_content", "a message of this role needs content")
            for name in ("tool_calls", "reasoning_content", "reasoning"):
                if getattr(self, name):
                    raise PydanticCustomError(
                        "wrong_role", "only a message of the assistant can have {name}", {"name": name}
                    )
        if self.role != "tool" and self.tool_call_id is not None:
            raise PydanticCustomError("wrong_role", "only a message of role tool can have tool_call_id")
        return self

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by a new line, as in vLLM."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())

    def for_template(self) -> Message:
        """Return the message for a chat template, which knows the role `system` and takes one string."""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        optional = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": reasoning}
        return message | {name: value for name, value in optional.items() if value is not None}


class FunctionDefinition(StrictModel):
    """A function that the model may call; without `parameters` it takes none."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="a JSON schema of type object")] = None
    strict: bool | None = None

    def schema_of_tool(self) -> ToolSchema:
        """Return the tool for grammars and parsers."""
        empty: dict[str, Any] = {"type": "object", "properties": {}}
        return ToolSchema(self.name, self.description, self.parameters or empty, bool(self.strict))


class ToolDefinition(StrictModel):
    """A tool of a request; `cache_control` is taken and has no effect."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = None


class NamedFunction(StrictModel):
    name: str


class NamedTool(StrictModel):
    """The choice of one tool, which the model then calls."""

    type: Literal["function"]
    function: NamedFunction


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
ToolDefinitions = Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    Field(description='none, auto, required or {"type": "function", "function": {"name": NAME}}'),
]
