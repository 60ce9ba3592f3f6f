"""Request validation beyond the schema, and translation into SamplingParams.

The limits are the server's and the model's. A structured output may be requested by OpenAI's `response_format`, by
vLLM's `structured_outputs` or by vLLM's older `guided_*` fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ...runtime.request import RequestRefused
from ...runtime.sampling_params import SamplingParams
from ...runtime.structured_outputs import StructuredOutputsParams
from ...runtime.text_worker import MAX_TOKENS
from ..engine.grammar_check import GrammarsWaiting
from .api_errors import ApiError, ContextExceeded, invalid, missing
from .engine_client import EngineClient
from .protocol.request_models import ChatRequest, CompletionRequest, GenerateRequest, ResponseFormat
from .server_config import ServerConfig

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; a chat may fill the context
MAX_PROMPT_CANDIDATES = 500_000  # 20 MB of JSON
SAMPLING_FIELDS = (  # SamplingParams has the same names
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "seed",
    "skip_special_tokens", "allowed_token_ids", "bad_words", "logprob_token_ids",
)  # fmt: skip
GUIDED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class RequestValidator:
    """Checks requests against the limits; raises ApiError naming the field."""

    def __init__(self, engine: EngineClient, config: ServerConfig) -> None:
        limits = engine.limits
        self.model_names = config.served_model_name or [engine.name]
        self.max_model_len = min(limits.max_length, config.max_total_tokens or limits.max_length)
        self.max_input = min(self.max_model_len - 1, config.max_input_tokens or self.max_model_len)
        self._config = config
        self._defaults = engine.default_params
        self._max_num_seqs, self._vocab_size = limits.max_num_seqs, limits.vocab_size
        self._has_priorities = limits.has_priorities

    def check(self, body: GenerateRequest) -> int:
        """Check everything but the number of prompt tokens; returns the number of outputs."""
        config, n = self._config, body.n or 1
        num_prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        self.check_model(body.model)
        self._at_most("n", n, min(config.max_n, self._max_num_seqs))
        self._at_most("stop", len(body.stop) if isinstance(body.stop, list) else 0, config.max_stop_strings, "strings")
        self._at_most("prompt", num_prompts, config.max_client_batch_size, "prompts")
        if isinstance(body, ChatRequest):
            self._check_chat(body)
        else:
            self._check_completion(body, n)
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options", "is for streams; leave it out or set stream to true")
        self._check_logprobs(body)
        if body.priority and not self._has_priorities:
            raise invalid("priority", "needs a server with --scheduling-policy priority")
        if (body.truncate_prompt_tokens or 0) > self.max_input:
            raise invalid("truncate_prompt_tokens", f"exceeds the longest prompt, {self.max_input} tokens")
        if body.truncation_side is not None and body.truncate_prompt_tokens is None:
            raise invalid("truncation_side", "needs truncate_prompt_tokens")
        limit = self._max_num_seqs + config.max_queued
        if num_prompts * n > limit:
            raise invalid("n", f"makes {num_prompts * n} outputs, but this server holds {limit}; send less at once")
        return num_prompts * n

    def sampling_params(
        self, body: GenerateRequest, prompt_lengths: Sequence[int], constraint: StructuredOutputsParams | None
    ) -> list[SamplingParams]:
        """Return the sampling parameters for prompts of these lengths in tokens.

        Those that the request leaves out are the model's recommendation.
        """
        lengths = [max(1, self._max_tokens(body, length)) for length in prompt_lengths]
        params = {length: self._sampling_params(body, length, constraint) for length in set(lengths)}
        return [params[length] for length in lengths]

    def _sampling_params(
        self, body: GenerateRequest, max_tokens: int, constraint: StructuredOutputsParams | None
    ) -> SamplingParams:
        fields = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
        num_top = None if body.logprob_token_ids else num_top_logprobs(body)
        try:
            params = msgspec.structs.replace(
                self._defaults, **fields, max_tokens=max_tokens, logprobs=num_top,
                prompt_logprobs=_num_prompt_logprobs(body), structured_outputs=constraint,
            )  # fmt: skip
            params.check_vocabulary(self._vocab_size)
        except ValueError as error:
            name = str(error).partition("=")[0].partition("[")[0]  # the message begins with the parameter
            param = name if name in type(body).model_fields else None
            raise ApiError(400, str(error), param=param, code="invalid_value") from error
        return params

    def truncated(self, body: GenerateRequest, ids: list[int]) -> list[int]:
        """Return the ids of a prompt that `truncate_prompt_tokens` keeps: by default the last ones."""
        limit = body.truncate_prompt_tokens
        if limit is None:
            return ids
        kept = self.max_input if limit == -1 else limit
        return ids[:kept] if body.truncation_side == "right" else ids[-kept:]

    def max_encoded(self, body: GenerateRequest) -> int:
        """Return the most tokens that a prompt may have before it is truncated."""
        return self.max_input if body.truncate_prompt_tokens is None else MAX_TOKENS

    def check_prompt_logprobs(self, body: GenerateRequest, num_prompt_tokens: int) -> None:
        """Raise ApiError if an answer has too many candidates of the prompt's log-probabilities."""
        num_top = _num_prompt_logprobs(body)
        candidates = 0 if num_top is None else num_prompt_tokens * (num_top + 1) * (body.n or 1)
        if candidates > MAX_PROMPT_CANDIDATES:
            rule = f"covers {num_prompt_tokens} tokens with {num_top} candidates each, {candidates} in all"
            way_out = f"an answer has at most {MAX_PROMPT_CANDIDATES}; lower logprobs or send fewer prompts at once"
            raise invalid("prompt_logprobs" if body.prompt_logprobs is not None else "echo", f"{rule}, but {way_out}")

    def check_model(self, name: str | None) -> None:
        """Raise 404 for a model that this server does not have."""
        if name is not None and name not in self.model_names:
            message = f"the model {name[:64]!r} does not exist here; there is {', '.join(self.model_names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_token_ids(self, ids: Sequence[int], param: str) -> None:
        """Raise ApiError for ids beyond the vocabulary."""
        if ids and max(ids) >= self._vocab_size:
            message = f"Invalid '{param}': {max(ids)} is not a token id; the model has ids 0 to {self._vocab_size - 1}."
            raise ApiError(400, message, param=param, code="invalid_value")

    def _check_logprobs(self, body: GenerateRequest) -> None:
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs", "is not for streams; leave it out or set stream to false")
        self._at_most("prompt_logprobs", body.prompt_logprobs or 0, self._config.max_logprobs)
        if body.logprob_token_ids and num_top_logprobs(body) is None:
            raise invalid("logprob_token_ids", "needs logprobs")

    def _check_chat(self, body: ChatRequest) -> None:
        self._at_most("top_logprobs", body.top_logprobs or 0, self._config.max_logprobs)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")

    def _check_completion(self, body: CompletionRequest, n: int) -> None:
        self._at_most("logprobs", body.logprobs or 0, self._config.max_logprobs)
        if body.best_of not in (None, n):
            message = f"best_of={body.best_of} is not implemented; leave it out or make it n ({n})"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        if body.max_tokens == 0 and (not body.echo or body.logprob_token_ids):
            raise invalid(
                "max_tokens",
                "is 0, which generates nothing; set echo and leave logprob_token_ids out, or set at least 1",
            )
        for prompt in body.prompts:
            if not isinstance(prompt, str):
                self.check_token_ids(prompt, "prompt")

    def _max_tokens(self, body: GenerateRequest, num_prompt_tokens: int) -> int:
        """Return the longest output in tokens; raises ApiError if prompt and output do not fit into the context."""
        requested, param, default = body.max_tokens, "prompt", COMPLETION_TOKENS
        room = self.max_model_len - num_prompt_tokens
        if isinstance(body, ChatRequest):
            requested, param, default = body.max_completion_tokens or body.max_tokens, "messages", room
        if num_prompt_tokens > self.max_input or (requested or 1) > room:
            raise ContextExceeded(param, num_prompt_tokens, requested, self.max_input, self.max_model_len)
        return min(room, default) if requested is None else requested

    def _at_most(self, param: str, value: int, limit: int, unit: str = "") -> None:
        """Raise ApiError for a value above its limit; `unit` is that of a list's entries."""
        if value > limit:
            message = f"Invalid '{param}': expected at most {limit}, but got {f'{value} {unit}'.strip()}."
            code = "array_above_max_length" if unit else "integer_above_max_value"
            raise ApiError(400, message, param=param, code=code)


def num_top_logprobs(body: GenerateRequest) -> int | None:
    """Return the number of candidates beside the sampled token; None if no log-probabilities are requested."""
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs


def _num_prompt_logprobs(body: GenerateRequest) -> int | None:
    """Return the number of candidates at each position of the prompt; an echo of a completion needs those too."""
    numbers = [
        body.prompt_logprobs,
        num_top_logprobs(body) if isinstance(body, CompletionRequest) and body.echo else None,
    ]
    return max((number for number in numbers if number is not None), default=None)


def structured_outputs(body: GenerateRequest) -> StructuredOutputsParams | None:
    """Return the requested constraint of the output, if any; raises ApiError naming the field."""
    requested = _structured_fields(body)
    if not requested:
        return None
    *others, field = requested
    if others:
        raise invalid(field, f"cannot be given together with {' and '.join(others)}; give one")
    try:
        return StructuredOutputsParams(**requested[field])
    except ValueError as error:
        raise invalid(field, str(error).partition("=")[2]) from error


def from_refusal(error: RequestRefused, body: GenerateRequest) -> ApiError:
    """Return the response to a request that the engine refuses; a grammar it cannot use names the request's field."""
    if isinstance(error, GrammarsWaiting):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    is_grammar = str(error).startswith("structured_outputs=")
    param = next(iter(_structured_fields(body)), None) if is_grammar else None
    return ApiError(400, str(error), param=param, code="invalid_value")


def _structured_fields(body: GenerateRequest) -> dict[str, dict[str, Any]]:
    """Return the fields that constrain the output, each with its arguments for StructuredOutputsParams."""
    fields: dict[str, dict[str, Any]] = {}
    if body.response_format is not None and body.response_format.type != "text":
        fields["response_format"] = _response_format(body.response_format)
    if body.structured_outputs is not None:
        fields["structured_outputs"] = body.structured_outputs.model_dump(
            exclude_none=True, exclude={"disable_fallback", "disable_additional_properties"}, by_alias=True
        )
    guided = {name: value for name in GUIDED_FIELDS if (value := getattr(body, name)) is not None}
    return fields | {name: {name.removeprefix("guided_"): value} for name, value in guided.items()}


def _response_format(response_format: ResponseFormat) -> dict[str, Any]:
    schema = None
    if response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise missing("response_format.json_schema")
        schema = response_format.json_schema.schema_
    return {"json_object": True} if schema is None else {"json": schema}
