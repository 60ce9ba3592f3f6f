"""What this server takes, beyond the shape of a request: its own limits, and the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...runtime.request import SamplingParams
from ..engine.async_engine import AsyncEngine
from .api_errors import ApiError, from_value_error
from .protocol.request_models import ChatRequest, CompletionRequest, fields_of
from .server_config import ServerConfig
from .structured_fields import structured_outputs

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; a chat goes on to the end of the context
ASKED = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "seed",
    "skip_special_tokens",
)  # fmt: skip
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by the checkpoint, if not asked


GenerateRequest = ChatRequest | CompletionRequest


class RequestValidator:
    """Raises ApiError, naming the field, for what is too much or makes no sense."""

    def __init__(self, service: AsyncEngine, config: ServerConfig) -> None:
        self.names = config.served_model_name or [service.name]
        self._config = config
        self._defaults = service.default_params
        self._max_num_seqs = service.limits.max_num_seqs
        self.max_total = min(service.limits.max_length, config.max_total_tokens or service.limits.max_length)
        self.max_input = min(self.max_total - 1, config.max_input_tokens or self.max_total)
        self._vocab_size = service.limits.vocab_size

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            message = f"the model {name[:64]!r} does not exist here; there is {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        if ids and max(ids) >= self._vocab_size:
            rule = f"is not a token id; the model has ids 0 to {self._vocab_size - 1}"
            raise ApiError(400, f"Invalid '{param}': {max(ids)} {rule}.", param=param, code="invalid_value")

    def check(self, body: GenerateRequest, num_prompts: int) -> int:
        """The number of outputs, of a request that may be admitted; its tokens are not known yet."""
        config, n = self._config, body.n or 1
        self.check_model(body.model)
        self._at_most("n", n, min(config.max_n, self._max_num_seqs))
        self._at_most("stop", len(body.stop) if isinstance(body.stop, list) else 0, config.max_stop_strings, "strings")
        self._at_most("prompt", num_prompts, config.max_client_batch_size, "prompts")
        top = body.top_logprobs if isinstance(body, ChatRequest) else body.logprobs
        self._at_most("top_logprobs" if isinstance(body, ChatRequest) else "logprobs", top or 0, config.max_logprobs)
        if isinstance(body, ChatRequest):
            _check_chat(body)
        else:
            _check_completion(body, n)
        if body.stream_options is not None and not body.stream:
            raise _invalid("stream_options", "is for streams; leave it out or set stream to true")
        limit = self._max_num_seqs + config.max_queued
        if num_prompts * n > limit:
            raise _invalid("n", f"makes {num_prompts * n} outputs, but this server holds {limit}; send less at once")
        return num_prompts * n

    def params(self, body: GenerateRequest, num_tokens: int) -> SamplingParams:
        """How to sample after a prompt of `num_tokens` tokens; what was not asked is the model's recommendation."""
        chat = isinstance(body, ChatRequest)
        asked = (body.max_completion_tokens or body.max_tokens) if isinstance(body, ChatRequest) else body.max_tokens
        room = self.max_total - num_tokens
        where = "messages" if chat else "prompt"
        if num_tokens > self.max_input or (asked or 1) > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {self.max_total} tokens, {self.max_input} of a prompt."
                f" However, you requested {num_tokens} in the {where} and {asked or 'at least 1'} in the completion;"
                " send or ask for less.",
                param=where,
                code="context_length_exceeded",
            )
        given = {name: value for name in ASKED if (value := getattr(body, name)) is not None}
        recommended = {name: getattr(self._defaults, name) for name in RECOMMENDED}
        own: dict[str, Any] = {
            "max_tokens": asked or (room if chat else min(room, COMPLETION_TOKENS)),
            "logprobs": num_top(body),
            "prompt_logprobs": num_top(body) if body.echo else None,
            "structured_outputs": structured_outputs(body),
        }
        try:
            params = SamplingParams(**(recommended | given | own))
            params.check_vocabulary(self._vocab_size)
        except ValueError as error:
            raise from_value_error(error, fields_of(type(body))) from error
        return params

    def _at_most(self, name: str, value: int, limit: int, what: str = "") -> None:
        if value > limit:
            found = f"{value} {what}".strip()
            message = f"Invalid '{name}': expected at most {limit}, but got {found}."
            raise ApiError(
                400, message, param=name, code="array_above_max_length" if what else "integer_above_max_value"
            )


def num_top(body: GenerateRequest) -> int | None:
    """Candidates at each position besides the chosen one; None if no log-probabilities are wanted."""
    if isinstance(body, ChatRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs


def _check_chat(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("top_logprobs", "needs logprobs to be true")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise _invalid("max_tokens", "differs from max_completion_tokens; give one of them")


def _check_completion(body: CompletionRequest, n: int) -> None:
    if body.best_of not in (None, n):
        message = f"best_of={body.best_of} is not implemented; leave it out or make it n ({n})"
        raise ApiError(400, message, param="best_of", code="unsupported_parameter")


def _invalid(param: str, rule: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}': it {rule}.", param=param, code="invalid_value")
