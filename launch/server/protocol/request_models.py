"""The request bodies: OpenAI's fields in strict types, and vLLM's fields for what OpenAI does not have.

A field that a model neither declares nor lists in `UNSUPPORTED` is refused as unknown. A field in `UNSUPPORTED`, which
other servers implement, takes null alone. Null always means the same as leaving the field out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from ....runtime.chat_template import Message
from ....runtime.request import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS

MAX_STOP_LENGTH = 1024  # unit: characters
MAX_ENTRIES = 1024  # applies to logit_bias, stop_token_ids and the choices of a structured output
NEUTRAL_ONLY = "neutral only"  # marks a field that is not implemented: it takes only the values that change nothing

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]  # int() takes "05", " 5" and "5_0" too
Bias = Annotated[float, Field(ge=-100, le=100)]


def _require_few_entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:  # pydantic makes an error for each wrong entry
        raise ValueError(f"it has {len(value)} entries; at most {MAX_ENTRIES}")
    return value


Biases = Annotated[
    dict[TokenKey, Bias],
    Field(max_length=MAX_ENTRIES),
    BeforeValidator(_require_few_entries),
    AfterValidator(lambda biases: {int(key): bias for key, bias in biases.items()}),
]


def _require_boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # pydantic takes 0.0 for Literal[False]
        raise ValueError("it must be a boolean")
    return value


FalseOnly = Annotated[Literal[False], BeforeValidator(_require_boolean)]
TrueOnly = Annotated[Literal[True], BeforeValidator(_require_boolean)]
NeutralFalse = Annotated[FalseOnly | None, NEUTRAL_ONLY]
NeutralTrue = Annotated[TrueOnly | None, NEUTRAL_ONLY]


class StrictModel(BaseModel):
    """A model without type coercion that refuses unknown fields, and unsupported fields that are not null."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.UNSUPPORTED:
                raise PydanticCustomError("unknown_parameter", "unknown field", {"name": name})
            if value is not None:
                raise PydanticCustomError("unsupported_parameter", "unsupported field", {"name": name})
        return self


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    include_obfuscation: FalseOnly | None = None


class JsonSchema(StrictModel):
    """OpenAI's wrapper of a JSON schema. The output always follows the schema, so `strict` changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema", description="a JSON schema")] = None
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`. The type `json_schema` without a schema means any object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: exactly one of json, regex, choice, grammar and json_object."""

    UNSUPPORTED: ClassVar = frozenset({"structural_tag", "whitespace_pattern"})

    json_: Annotated[
        str | dict[str, Any] | None, Field(alias="json", description="a JSON schema, as an object or as text")
    ] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: NeutralFalse = None
    disable_fallback: bool | None = None


class GenerateFields(StrictModel):
    """The fields that completions and chats have in common."""

    UNSUPPORTED: ClassVar = frozenset({
        "allowed_token_ids", "bad_words", "cache_salt", "guided_decoding_backend", "guided_whitespace_pattern",
        "kv_transfer_params", "length_penalty", "logits_processors", "metadata", "priority", "prompt_logprobs",
        "truncate_prompt_tokens", "vllm_xargs",
    })  # fmt: skip

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        Biases | None,
        Field(description=f"up to {MAX_ENTRIES} token ids mapped to numbers from -100 to 100"),
    ] = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None,
        Field(description=f"a string of 1 to {MAX_STOP_LENGTH} characters or a list of up to {MAX_STOP_STRINGS}"),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ENTRIES, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[str | dict[str, Any] | None, Field(description="a JSON schema, as an object or text")] = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    return_tokens_as_token_ids: NeutralFalse = None
    spaces_between_special_tokens: NeutralTrue = None
    use_beam_search: NeutralFalse = None


class CompletionRequest(GenerateFields):
    """Body of POST /v1/completions."""

    UNSUPPORTED: ClassVar = GenerateFields.UNSUPPORTED | {"prompt_embeds", "suffix"}

    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        Field(description="a non-empty string, a list of them, a list of token ids, or a list of such lists"),
    ]  # fmt: skip
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    add_special_tokens: NeutralTrue = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also if there is only one."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", [self.prompt] if is_single else self.prompt)


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message of a conversation."""

    UNSUPPORTED: ClassVar = frozenset({
        "annotations", "audio", "function_call", "name", "reasoning_content", "refusal", "tool_call_id", "tool_calls"
    })  # fmt: skip

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)],
        Field(description="a string or a list of text parts; images and audio are not implemented"),
    ]

    def for_template(self) -> Message:
        """Return the message for a chat template, which knows the role `system` and takes one string.

        Parts are joined by a new line, as in vLLM.
        """
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatRequest(GenerateFields):
    """Body of POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar = GenerateFields.UNSUPPORTED | {
        "audio", "best_of", "chat_template", "chat_template_kwargs", "documents", "functions", "include_reasoning",
        "mm_processor_kwargs", "prediction", "reasoning_effort", "tools", "verbosity", "web_search_options",
    }  # fmt: skip

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: NeutralFalse = None
    add_generation_prompt: NeutralTrue = None
    add_special_tokens: NeutralFalse = None
    continue_final_message: NeutralFalse = None
    echo: NeutralFalse = None
    function_call: Annotated[Literal["none"] | None, NEUTRAL_ONLY] = None
    modalities: Annotated[list[Literal["text"]] | None, NEUTRAL_ONLY] = None
    tool_choice: Annotated[Literal["none"] | None, NEUTRAL_ONLY] = None


GenerateRequest = CompletionRequest | ChatRequest


class TokenizeRequest(StrictModel):
    """Body of POST /tokenize: a prompt or a conversation."""

    UNSUPPORTED: ClassVar = frozenset({"chat_template", "chat_template_kwargs", "tools"})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: NeutralTrue = None
    add_special_tokens: NeutralTrue = None
    continue_final_message: NeutralFalse = None


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a request and of its nested models by name, or as `parent.name` where names are equal."""
    fields = StreamOptions.model_fields | TextPart.model_fields | ChatMessage.model_fields | model.model_fields
    nested: dict[str, type[BaseModel]] = {
        "response_format": ResponseFormat, "json_schema": JsonSchema, "structured_outputs": StructuredOutputs
    }  # fmt: skip
    for parent, part in nested.items():
        fields |= {f"{parent}.{field.alias or name}": field for name, field in part.model_fields.items()}
    return fields
