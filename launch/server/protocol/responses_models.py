"""The request body of OpenAI's Responses API, and its translation into a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

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
from .request_models import Count, Metadata, ReasoningEffort, SamplingFields, ServiceTier, TemplateKwargs, TopCount
from .strict_model import FalseOnly, NeutralFalse, StrictModel


class InputText(InputModel):
    """A text of a message; annotations and log-probabilities of an earlier answer have no effect."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


TEXTS_ONLY = Field(description="a string or a list of text parts; images, audio and files are not implemented")
Texts = Annotated[list[InputText], BeforeValidator(as_texts), TEXTS_ONLY]


class InputMessage(InputModel):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(InputModel):
    type: Literal["function_call"]
    namespace: Annotated[str, Field(max_length=256)] | None = None
    call_id: Annotated[str, Field(max_length=256)]
    name: Annotated[str, Field(max_length=256)]
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(InputModel):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=256)]
    output: Texts
    id: str | None = None
    status: str | None = None


class InputReasoning(InputModel):
    """Reasoning of an earlier answer; its summary counts only if its text is not there."""

    type: Literal["reasoning"]
    summary: list[InputText] | None = None
    content: list[InputText] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


def _type_of_item(item: Any) -> Any:
    return "message" if isinstance(item, dict) and "type" not in item else type_of(item)


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _type_of_item,
        custom_error_type="unknown_item",
        custom_error_message="expected a message, function_call, function_call_output or reasoning",
    ),
]


class ResponsesFunction(StrictModel):
    """A function that the model may call; `strict` changes nothing where its schema can be followed."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="a JSON schema of type object")] = None
    strict: bool | None = None
    defer_loading: NeutralFalse = None


class ToolNamespace(StrictModel):
    """Functions under a common name; the model sees each as NAMESPACE.NAME."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: Annotated[list[ResponsesFunction], Field(max_length=MAX_TOOLS, fail_fast=True)]


class OfflineWebSearch(StrictModel):
    """Codex's offer of a search without access to the web. It is taken, and the model does not see it."""

    type: Literal["web_search"]
    external_web_access: FalseOnly
    filters: dict[str, Any] | None = None
    search_content_types: list[str] | None = None
    search_context_size: str | None = None
    user_location: dict[str, Any] | None = None


def _type_of_tool(tool: Any) -> Any:
    """Return the type of a tool that is implemented; of searches, those without access to the web are."""
    kind = type_of(tool)
    is_online = isinstance(tool, dict) and tool.get("external_web_access") is not False
    return None if kind == "web_search" and is_online else kind


ResponsesTools = Annotated[
    Annotated[ResponsesFunction, Tag("function")]
    | Annotated[ToolNamespace, Tag("namespace")]
    | Annotated[OfflineWebSearch, Tag("web_search")],
    Discriminator(
        _type_of_tool,
        custom_error_type="unknown_tool",
        custom_error_message="expected a function, a namespace or a web_search with external_web_access false",
    ),
]


class ResponsesTool(StrictModel):
    """The choice of one function."""

    type: Literal["function"]
    name: str


class ResponsesReasoning(StrictModel):
    """The field `reasoning`; answers have the reasoning itself in place of a summary."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema", description="a JSON schema")] = None
    strict: bool | None = None


class TextOptions(StrictModel):
    format: TextFormat | None = None
    verbosity: Annotated[Literal["medium"] | None, "neutral only"] = None


# Those of tools of OpenAI's servers, and of images, add nothing: there are none here.
Includable = Literal[
    "reasoning.encrypted_content", "message.output_text.logprobs", "web_search_call.action.sources",
    "web_search_call.results", "code_interpreter_call.outputs", "file_search_call.results",
    "computer_call_output.output.image_url", "message.input_image.image_url",
]  # fmt: skip


class ResponsesStreamOptions(StrictModel):
    include_obfuscation: FalseOnly | None = None


class ResponsesRequest(SamplingFields):
    """Body of POST /v1/responses; nothing is stored."""

    UNSUPPORTED: ClassVar = frozenset({"conversation", "previous_response_id", "prompt"})

    model: str | None = None
    input: Annotated[list[InputItem], Field(min_length=1, fail_fast=True), BeforeValidator(_as_items)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    store: NeutralFalse = None
    background: NeutralFalse = None
    truncation: Annotated[Literal["disabled"] | None, "neutral only"] = None
    include: list[Includable] | None = None
    tools: Annotated[list[ResponsesTools], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ResponsesTool | None,
        Field(description='none, auto, required or {"type": "function", "name": NAME}'),
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning: ResponsesReasoning | None = None
    text: TextOptions | None = None
    top_logprobs: TopCount | None = None
    max_tool_calls: Count | None = None  # of tools of OpenAI's servers
    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None
    client_metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @property
    def has_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    def chat_fields(self) -> ChatFields:
        """Return the fields of the chat request that computes the answer."""
        choice = self.tool_choice
        if isinstance(choice, ResponsesTool):
            choice = choice_fields(choice.name)  # type: ignore[assignment]
        fields = {
            "messages": _merge_system(list(_messages(self.instructions, self.input))),
            "max_completion_tokens": self.max_output_tokens,
            "tools": list(self._functions()),
            "tool_choice": choice,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": _response_format(self.text.format if self.text else None),
            "logprobs": self.has_logprobs,
            "top_logprobs": self.top_logprobs or None,
        }
        same = ("model", "stream", "parallel_tool_calls", "chat_template_kwargs", *SamplingFields.model_fields)
        return fields | {name: getattr(self, name) for name in same}

    def _functions(self) -> Iterator[ChatFields]:
        """Yield the functions under the names that the model sees."""
        for tool in self.tools or ():
            if isinstance(tool, ResponsesFunction):
                yield _function(tool)
            elif isinstance(tool, ToolNamespace):
                yield from (_function(function, tool.name) for function in tool.tools)

    def namespaces(self) -> dict[str, tuple[str, str]]:
        """Return the namespace and the name of each function in a namespace, by the name that the model sees."""
        spaces = [tool for tool in self.tools or () if isinstance(tool, ToolNamespace)]
        return {full_name(s.name, tool.name): (s.name, tool.name) for s in spaces for tool in s.tools}


def _function(tool: ResponsesFunction, namespace: str | None = None) -> ChatFields:
    return tool_fields(full_name(namespace, tool.name), tool.description, tool.parameters, tool.strict)


def full_name(namespace: str | None, name: str) -> str:
    """Return the name under which the model sees a function."""
    return name if namespace is None else f"{namespace}.{name}"


def _response_format(text_format: TextFormat | None) -> ChatFields | None:
    if text_format is None:
        return None
    if text_format.type != "json_schema":
        return {"type": text_format.type}
    return format_fields(text_format.model_dump(exclude={"type"}, exclude_none=True, by_alias=True))


def _messages(instructions: str | None, items: Sequence[InputItem]) -> Iterator[ChatFields]:
    """Yield the messages; items of the assistant that follow each other are one message."""
    if instructions:
        yield {"role": "system", "content": instructions}
    turn: ChatFields = {}
    for item in items:
        if isinstance(item, InputCallOutput):
            message: ChatFields = {"role": "tool", "tool_call_id": item.call_id, "content": _join(item.output)}
        elif isinstance(item, InputMessage) and item.role != "assistant":
            message = {"role": item.role, "content": _join(item.content)}
        else:
            if _begins_turn(item, turn):
                yield turn
                turn = {}
            turn["role"] = "assistant"
            _add_to_turn(turn, item)
            continue
        if turn:
            yield turn
            turn = {}
        yield message
    if turn:
        yield turn


def _begins_turn(item: InputItem, turn: ChatFields) -> bool:
    """Return whether an item of the assistant begins another message."""
    if isinstance(item, InputReasoning):
        return bool(turn.get("content") or turn.get("tool_calls"))
    return isinstance(item, InputMessage) and ("content" in turn or "tool_calls" in turn)


def _add_to_turn(turn: ChatFields, item: InputMessage | InputCall | InputReasoning) -> None:
    if isinstance(item, InputReasoning):
        turn["reasoning_content"] = turn.get("reasoning_content", "") + _join(item.content or item.summary or ())
    elif isinstance(item, InputCall):
        call = call_fields(item.call_id, full_name(item.namespace, item.name), item.arguments)
        turn.setdefault("tool_calls", []).append(call)
    else:
        turn["content"] = _join(item.content)


def _join(parts: Sequence[InputText]) -> str:
    return "\n".join(part.text for part in parts)


def _merge_system(messages: Sequence[ChatFields]) -> list[ChatFields]:
    """Join the system messages at the beginning, of which many templates take one only."""
    first = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    if not first:
        return list(messages)
    text = "\n\n".join(message["content"] for message in first)
    return [{"role": "system", "content": text}, *messages[len(first) :]]
