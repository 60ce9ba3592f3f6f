"""The request bodies of Anthropic's Messages API, and their translation into a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ....runtime.sampling_params import MAX_STOP_STRINGS
from .input_models import (
    ChatFields,
    InputModel,
    as_texts,
    call_fields,
    choice_fields,
    format_fields,
    tool_fields,
    type_of,
)
from .message_models import MAX_TOOLS, ToolName
from .request_models import Count, Metadata, ReasoningEffort, Stop
from .strict_model import NEUTRAL_ONLY, NeutralFalse, StrictModel

CacheControl = dict[str, Any]


class TextBlock(InputModel):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


TEXTS_ONLY = Field(description="a string or a list of text blocks; images and documents are not implemented")
TextBlocks = Annotated[list[TextBlock], BeforeValidator(as_texts), TEXTS_ONLY]


class ThinkingBlock(InputModel):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    cache_control: CacheControl | None = None


class ToolUseBlock(InputModel):
    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=256)]
    name: Annotated[str, Field(max_length=256)]
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None


class ToolResultBlock(InputModel):
    """The result of a call; `is_error` is for the reader of the conversation and has no effect."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=256)]
    content: TextBlocks | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        type_of,
        custom_error_type="unknown_block",
        custom_error_message="expected a block of type text, thinking, tool_use or tool_result",
    ),
]


class AnthropicMessage(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], BeforeValidator(as_texts)]

    def chat_messages(self) -> Iterator[ChatFields]:
        """Yield the messages of a chat: results of tools each have one, before the rest."""
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        for block in results:
            content = "\n".join(part.text for part in block.content or ())
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
        text = "\n".join(block.text for block in self.content if isinstance(block, TextBlock))
        message: ChatFields = {"role": self.role, "content": text}
        thoughts = [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        calls = [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]
        if calls:
            message["tool_calls"] = calls
        if text or not results or thoughts or calls:
            yield message


def _call(block: ToolUseBlock) -> ChatFields:
    return call_fields(block.id, block.name, json.dumps(block.input, ensure_ascii=False))


class AnthropicTool(StrictModel):
    """A tool of the client; those of Anthropic's servers are refused."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Annotated[dict[str, Any], Field(description="a JSON schema of type object")]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    defer_loading: NeutralFalse = None
    allowed_callers: Annotated[list[Literal["direct"]] | None, NEUTRAL_ONLY] = None

    def chat_tool(self) -> ChatFields:
        return tool_fields(self.name, self.description, self.input_schema, self.strict)


class AnthropicToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def chat_choice(self) -> str | ChatFields:
        if self.type == "tool":
            return choice_fields(self.name or "")
        return "required" if self.type == "any" else self.type


class ThinkingOptions(StrictModel):
    """The field `thinking`. `budget_tokens` is no limit, as in Anthropic's API: the model decides when to stop."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: str | None = None


class KeepThinking(StrictModel):
    """The edit that keeps all thinking, as this server does."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(StrictModel):
    edits: list[KeepThinking] | None = None


class OutputFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema", description="a JSON schema")]


class OutputConfig(StrictModel):
    effort: ReasoningEffort | None = None
    format: OutputFormat | None = None


class CountTokensRequest(StrictModel):
    """Body of POST /v1/messages/count_tokens."""

    UNSUPPORTED: ClassVar = frozenset({"container"})

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, fail_fast=True)]
    system: TextBlocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    mcp_servers: Annotated[list[Any] | None, Field(max_length=0), NEUTRAL_ONLY] = None
    speed: Annotated[Literal["standard"] | None, NEUTRAL_ONLY] = None
    cache_control: CacheControl | None = None

    @field_validator("output_config")
    @classmethod
    def _check_format(cls, config: OutputConfig | None, info: ValidationInfo) -> OutputConfig | None:
        """Refuse a format of an answer that has begun, as Anthropic's API does: it would hold for the rest alone."""
        if config is not None and config.format is not None and _continues_answer(info.data.get("messages")):
            message = "a format excludes a last message of the assistant, whose text would begin the answer"
            raise PydanticCustomError("format_of_rest", message)
        return config

    def chat_fields(self) -> ChatFields:
        """Return the fields of the chat request that computes the answer."""
        config, choice, thinking = self.output_config, self.tool_choice, self.thinking
        fields: ChatFields = {
            "model": self.model,
            "messages": list(_messages(self.system or (), self.messages)),
            "tools": [tool.chat_tool() for tool in self.tools or ()],
            "tool_choice": choice and choice.chat_choice(),
            "reasoning_effort": config and config.effort,
            "chat_template_kwargs": thinking and {"enable_thinking": thinking.type != "disabled"},
        }
        if _continues_answer(self.messages):
            fields["continue_final_message"] = True
        if choice is not None and choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
        if config is not None and config.format is not None:
            fields["response_format"] = format_fields({"schema": config.format.schema_})
        return fields


class MessagesRequest(CountTokensRequest):
    """Body of POST /v1/messages."""

    max_tokens: Count
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    def chat_fields(self) -> ChatFields:
        """Return the fields of the chat request that computes the answer."""
        same = ("stream", "temperature", "top_p", "top_k")
        fields = super().chat_fields() | {name: getattr(self, name) for name in same}
        return fields | {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences or None}


def _continues_answer(messages: Sequence[AnthropicMessage] | None) -> bool:
    """Return whether the last message is the beginning of the answer: a text of the assistant."""
    if not messages or messages[-1].role != "assistant" or not messages[-1].content:
        return False
    block = messages[-1].content[-1]
    return isinstance(block, TextBlock) and bool(block.text)


def _messages(system: Sequence[TextBlock], messages: Sequence[AnthropicMessage]) -> Iterator[ChatFields]:
    if system:
        yield {"role": "system", "content": "\n".join(block.text for block in system)}
    for message in messages:
        yield from message.chat_messages()
