"""The request bodies: OpenAI's fields in strict types, and vLLM's fields for what OpenAI does not have.

A field that a model neither declares nor lists in `UNSUPPORTED` is refused as unknown. A field in `UNSUPPORTED`, which
other servers implement, takes null alone. Null always means the same as leaving the field out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from ....runtime.chat_template import RESERVED_TEMPLATE_KWARGS
from ....runtime.sampling_params import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    MAX_STOPS_BY_DEFAULT,
)
from .message_models import Messages, ToolChoice, ToolDefinitions
from .strict_model import NEUTRAL_ONLY, FalseOnly, NeutralFalse, NeutralTrue, StrictModel

MAX_STOP_LENGTH = 1024  # unit: characters
MAX_ENTRIES = 1024  # applies to logit_bias, stop_token_ids and the choices of a structured output
MAX_SALT_LENGTH = 1024  # characters, as in vLLM
MAX_TEMPLATE_KWARGS = 65536  # characters of chat_template_kwargs as JSON

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TopCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
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


def _check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if reserved := RESERVED_TEMPLATE_KWARGS & kwargs.keys():
        rule = "{name} is not for the template; it is a field of the request, or not implemented"
        raise PydanticCustomError("reserved_name", rule, {"name": min(reserved)})
    if len(json.dumps(kwargs)) > MAX_TEMPLATE_KWARGS:
        rule = "it has more than {limit} characters of JSON"
        raise PydanticCustomError("too_long", rule, {"limit": MAX_TEMPLATE_KWARGS})
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_check_template_kwargs)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]  # answers come from the default one
Metadata = Annotated[dict[str, Any], Field(max_length=64)]


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
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


class SamplingFields(StrictModel):
    """Fields of sampling, of the end of an output, of priority and of cached prefixes."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        Biases | None, Field(description=f"up to {MAX_ENTRIES} token ids mapped to numbers from -100 to 100")
    ] = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]] | None,
        Field(max_length=MAX_BAD_WORDS, fail_fast=True),
    ] = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None,
        Field(
            description=f"a string of 1 to {MAX_STOP_LENGTH} characters or a list of them, at most --max-stop-strings"
            f" (default {MAX_STOPS_BY_DEFAULT})"
        ),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_ENTRIES, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    priority: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None


class GenerateFields(SamplingFields):
    """The fields that completions and chats have in common."""

    UNSUPPORTED: ClassVar = frozenset({
        "guided_decoding_backend", "guided_whitespace_pattern", "kv_transfer_params", "length_penalty",
        "logits_processors", "vllm_xargs",
    })  # fmt: skip

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[str | dict[str, Any] | None, Field(description="a JSON schema, as an object or text")] = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    logprob_token_ids: (
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGPROB_TOKEN_IDS, fail_fast=True)] | None
    ) = None
    prompt_logprobs: TopCount | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[
        Literal[-1] | Count | None,
        Field(description="the number of tokens to keep, at least 1, or -1 for as many as fit"),
    ] = None
    truncation_side: Literal["left", "right"] | None = None

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
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: TopCount | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, also if there is only one."""
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", [self.prompt] if is_single else self.prompt)


class TemplateFields(StrictModel):
    """The fields that decide how a conversation becomes a prompt."""

    tools: ToolDefinitions | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatRequest(GenerateFields, TemplateFields):
    """Body of POST /v1/chat/completions."""

    UNSUPPORTED: ClassVar = GenerateFields.UNSUPPORTED | {
        "audio", "best_of", "chat_template", "documents", "functions", "mm_processor_kwargs", "prediction",
        "web_search_options",
    }  # fmt: skip

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    service_tier: ServiceTier | None = None
    store: NeutralFalse = None
    function_call: Annotated[Literal["none"] | None, NEUTRAL_ONLY] = None
    modalities: Annotated[list[Literal["text"]] | None, NEUTRAL_ONLY] = None
    verbosity: Annotated[Literal["medium"] | None, NEUTRAL_ONLY] = None


GenerateRequest = CompletionRequest | ChatRequest


class TokenizeRequest(TemplateFields):
    """Body of POST /tokenize: a prompt or a conversation."""

    UNSUPPORTED: ClassVar = frozenset({"chat_template"})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


@cache
def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a request by name, and those of its nested models as `parent.name`."""
    fields: dict[str, FieldInfo] = {}
    _add_fields(fields, model, "")
    return fields


def _add_fields(fields: dict[str, FieldInfo], model: type[BaseModel], prefix: str) -> None:
    for name, field in model.model_fields.items():
        key = field.alias or name
        if prefix + key not in fields:
            fields[prefix + key] = field
            for nested in _models_in(field.annotation):
                _add_fields(fields, nested, f"{key}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
