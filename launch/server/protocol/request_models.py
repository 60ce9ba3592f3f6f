"""What may be asked: OpenAI's requests, in strict types, with vLLM's names for what OpenAI has not.

A field that is not here is refused, and so is one marked `NOT_HERE` with any value but those that change nothing.
None is always as good as leaving the field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from ....runtime.request import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS
from ..api_errors import Unsupported

LONGEST_STOP = 1024  # characters of a stop string
MOST_ENTRIES = 1024  # of logit_bias and stop_token_ids

NOT_HERE = Unsupported()
Never = Annotated[None, NOT_HERE]

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MOST_ENTRIES, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # pydantic takes 0.0 for Literal[False]
        raise ValueError("it must be a boolean")
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]
On = Annotated[Literal[True], BeforeValidator(_boolean)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class JsonSchema(Strict):
    """OpenAI's wrapper of a schema; the output always keeps to it, so `strict` makes no difference."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema", description="a JSON schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`json_schema` is for the type of that name; without a schema any object will do."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's: exactly one of json, regex, choice, grammar and json_object."""

    json_: Annotated[
        str | dict[str, Any] | None, Field(alias="json", description="a JSON schema, as an object or as text")
    ] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    disable_additional_properties: Annotated[Off | None, NOT_HERE] = None
    disable_fallback: bool | None = None
    structural_tag: Never = None
    whitespace_pattern: Never = None


class Generate(Strict):
    """What completions and chats have in common."""

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
        dict[Annotated[int, Field(ge=0, lt=2**31)], Bias] | None,
        Field(max_length=MOST_ENTRIES, description="token ids mapped to numbers from -100 to 100"),
    ] = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None,
        Field(description=f"a string of 1 to {LONGEST_STOP} characters or a list of up to {MAX_STOP_STRINGS}"),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_ENTRIES, fail_fast=True)] | None = None
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

    allowed_token_ids: Never = None
    bad_words: Never = None
    cache_salt: Never = None
    guided_decoding_backend: Never = None
    guided_whitespace_pattern: Never = None
    kv_transfer_params: Never = None
    length_penalty: Never = None
    logits_processors: Never = None
    metadata: Never = None
    priority: Never = None
    prompt_logprobs: Never = None
    return_tokens_as_token_ids: Annotated[Off | None, NOT_HERE] = None
    spaces_between_special_tokens: Annotated[On | None, NOT_HERE] = None
    truncate_prompt_tokens: Never = None
    use_beam_search: Annotated[Off | None, NOT_HERE] = None
    vllm_xargs: Never = None


class CompletionRequest(Generate):
    """POST /v1/completions."""

    prompt: Annotated[
        Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)] | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
        Field(description="a non-empty string, a list of them, a list of token ids, or a list of such lists"),
    ]  # fmt: skip
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None

    add_special_tokens: Annotated[On | None, NOT_HERE] = None
    prompt_embeds: Never = None
    suffix: Never = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)],
        Field(description="a string or a list of text parts; images and audio are not implemented"),
    ]

    annotations: Never = None
    audio: Never = None
    function_call: Never = None
    name: Never = None
    reasoning_content: Never = None
    refusal: Never = None
    tool_call_id: Never = None
    tool_calls: Never = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class ChatRequest(Generate):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[Off | None, NOT_HERE] = None

    add_generation_prompt: Annotated[On | None, NOT_HERE] = None
    add_special_tokens: Annotated[Off | None, NOT_HERE] = None
    audio: Never = None
    best_of: Never = None
    chat_template: Never = None
    chat_template_kwargs: Never = None
    continue_final_message: Annotated[Off | None, NOT_HERE] = None
    documents: Never = None
    echo: Annotated[Off | None, NOT_HERE] = None
    function_call: Annotated[Literal["none"] | None, NOT_HERE] = None
    functions: Never = None
    include_reasoning: Never = None
    mm_processor_kwargs: Never = None
    modalities: Annotated[list[Literal["text"]] | None, NOT_HERE] = None
    prediction: Never = None
    reasoning_effort: Never = None
    tool_choice: Annotated[Literal["none"] | None, NOT_HERE] = None
    tools: Never = None
    verbosity: Never = None
    web_search_options: Never = None


class TokenizeRequest(Strict):
    """POST /tokenize: of a prompt, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None

    add_generation_prompt: Annotated[On | None, NOT_HERE] = None
    add_special_tokens: Annotated[On | None, NOT_HERE] = None
    chat_template: Never = None
    chat_template_kwargs: Never = None
    continue_final_message: Annotated[Off | None, NOT_HERE] = None
    tools: Never = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a request and of what may be nested in it, by name; where two might be meant, as `parent.name`."""
    anywhere: list[type[BaseModel]] = [StreamOptions, TextPart, ChatMessage, model]
    found = {name: field for part in anywhere for name, field in part.model_fields.items()}
    parents: dict[str, type[BaseModel]] = {
        "response_format": ResponseFormat,
        "json_schema": JsonSchema,
        "structured_outputs": StructuredOutputs,
    }
    for parent, part in parents.items():
        found |= {f"{parent}.{field.alias or name}": field for name, field in part.model_fields.items()}
    return found
