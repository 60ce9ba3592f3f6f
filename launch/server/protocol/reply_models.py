"""The response bodies: OpenAI's objects, with vLLM's `stop_reason` beside `finish_reason`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer
from typing_extensions import TypedDict

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Reply(BaseModel):
    """The fields that all replies and chunks of generation have, in their order."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None
    system_fingerprint: None = None


class PromptLogprob(BaseModel):
    """One candidate at one position of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]  # by token id, for each position; null for the first


class ReturnedIds(BaseModel):
    """The token ids of a chunk for `return_token_ids`; those of the prompt are in the first chunk only."""

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in ID_FIELDS or value is not None}


ID_FIELDS = ("prompt_token_ids", "token_ids")


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion: entry i of each list belongs to token i.

    `text[text_offset[i]:]` begins with `tokens[i]`. The first token of an echoed prompt has null in place of its
    log-probabilities.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChunkChoice(BaseModel):
    """The new part of one output in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class CompletionChunkChoiceIds(CompletionChunkChoice, ReturnedIds): ...


class CompletionChoice(CompletionChunkChoice):
    """One output of a completion; the ids and the log-probabilities of the prompt are null unless requested."""

    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Reply):
    """Reply of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionChunk(Reply):
    """A chunk of a stream of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]


class CompletionChunkIds(Reply):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoiceIds]


class Candidate(BaseModel):
    """One candidate at one position; `bytes` is empty for a token that has no text, as a special token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenCandidates(Candidate):
    """The sampled token with the likeliest candidates at its position."""

    top_logprobs: list[Candidate]


class ChatLogprobs(BaseModel):
    content: list[TokenCandidates]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A complete call of a tool; `arguments` is JSON text."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatAnswer(BaseModel):
    """The message of an answer; reasoning and calls are left out where there are none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = ("role", "content", "refusal")
        return {name: value for name, value in handler(self).items() if name in kept or value is not None}


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Reply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class FunctionDelta(TypedDict, total=False):
    """The name of a call, once, and the new part of its arguments."""

    name: str
    arguments: str


class ToolCallDelta(TypedDict, total=False):
    """The new part of the call with this index; its first part has `id`, `type` and the name."""

    index: int
    id: str
    type: Literal["function"]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """The new part of a message in a stream."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class ChatChunkChoiceIds(ChatChunkChoice, ReturnedIds): ...


class ChatChunk(Reply):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ChatChunkIds(Reply, ReturnedIds):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoiceIds]


class Model(BaseModel):
    """A served name; `root` is the model behind it, without the folders of the server.

    The last fields are those of Anthropic's API, whose clients ask for models at the same route.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lockstep"] = "lockstep"
    root: str
    parent: None = None
    max_model_len: int
    type: Literal["model"] = "model"
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class InputTokens(BaseModel):
    """The reply of /v1/messages/count_tokens."""

    input_tokens: int


class Detokenized(BaseModel):
    prompt: str


class Healthy(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str
