"""The options of the HTTP server, which `lockstep serve` adds to those of Config, and its limits without an option."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...runtime.chat.parser_names import ReasoningParserName, ToolCallParserName
from ...runtime.config import check_bounds, option
from ...runtime.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS, MAX_STOPS_BY_DEFAULT

MIB = 2**20
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The name of the model, and the format of its chats; raises ValueError naming field, value and rule."""

    served_model_name: list[str] | None = option(None, "name of the model in requests; repeat for several")
    chat_template: str | None = option(None, "file with a Jinja chat template, in place of the checkpoint's")
    default_chat_template_kwargs: str | None = option(
        None, "JSON object of variables for the chat template; chat_template_kwargs of a request override them"
    )
    tool_call_parser: ToolCallParserName = option("auto", "format of tool calls; auto finds it in the chat template")
    reasoning_parser: ReasoningParserName = option("auto", "format of reasoning; auto finds it in the chat template")

    def __post_init__(self) -> None:
        if not isinstance(self.template_kwargs, dict):
            raise ValueError(f"default_chat_template_kwargs={self.default_chat_template_kwargs!r} is no JSON object")
        if any(not name.strip() for name in self.served_model_name or []):
            raise ValueError("an empty served_model_name would match nothing or everything; give a text")

    @cached_property
    def template_kwargs(self) -> dict[str, Any]:
        """The parsed default_chat_template_kwargs."""
        try:
            return json.loads(self.default_chat_template_kwargs or "{}")  # type: ignore[no-any-return]
        except ValueError as error:
            text = self.default_chat_template_kwargs
            raise ValueError(f"default_chat_template_kwargs={text!r} is not JSON: {error}") from None


@dataclass(frozen=True, kw_only=True)
class ServerConfig(ChatOptions):
    """The address, the keys and the limits of the server; raises ValueError naming field, value and rule."""

    replicas: int = option(1, "groups of tensor_parallel_size ranks that share the requests, under Ray Serve")
    api_server_count: int = option(1, "processes that answer HTTP requests; 1: the engine's process does", high=64)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is all interfaces, which an api-key should protect")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    api_key: list[str] | None = option(
        None, "key that requests must carry, on every route but /health; repeat for several", envvar="LOCKSTEP_API_KEY"
    )
    allowed_hosts: list[str] | None = option(
        None,
        "name in Host headers that is accepted beside loopback ones, * is any; repeat for several. Without it a server "
        "on a loopback address accepts loopback names only, and others accept any",
    )
    cors_origins: list[str] | None = option(
        None, "origin whose pages may use this server from a browser, such as https://example.com; repeat for several"
    )
    max_concurrent_requests: int = option(1024, "requests answered at once; more are refused with 429")
    max_queued: int = option(1024, "outputs that wait for a place in the batch; more are refused with 429", low=0)
    max_input_tokens: int | None = option(None, "longest prompt, in tokens; what fits if not given")
    max_total_tokens: int | None = option(None, "longest prompt plus output, in tokens; the context if not given")
    max_n: int = option(128, "outputs for each prompt", high=MAX_N)
    max_stop_strings: int = option(MAX_STOPS_BY_DEFAULT, "stop strings of a request", high=MAX_STOP_STRINGS)
    max_client_batch_size: int = option(128, "prompts of a request")
    max_logprobs: int = option(20, "candidates with log-probabilities at each position", low=0, high=MAX_LOGPROBS)
    max_body_bytes: int = option(4 * MIB, "longest body of a request, in bytes; a longer one is refused with 413")
    drain_timeout: float = option(30.0, "seconds that live requests get to end after SIGTERM or Ctrl-C", low=0)
    max_restarts: int = option(3, "restarts of failed ranks within ten minutes, and as many of API servers", low=0)
    keep_alive_on_engine_death: bool = option(
        False, "answer with 503 when the engine has failed for good, instead of ending with status 1"
    )
    preflight: bool = option(
        True, "run the checks of lockstep doctor before the start, except those that read all weights"
    )
    return_tokens_as_token_ids: bool = option(
        False, "log-probabilities name tokens as token_id:N, unless the field of this name in a request is false"
    )
    log_requests: bool = option(False, "log a line for each request, without its text")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self)
        for origin in self.cors_origins or []:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"cors_origins={origin!r} is not an origin; give a scheme, a host and perhaps a port")
        for name in ("api_key", "allowed_hosts"):
            if any(not text.strip() for text in getattr(self, name) or []):
                raise ValueError(f"an empty {name} would match nothing or everything; give a text")


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ChatOptions):
    """The options of `lockstep run-batch` beside those of Config."""

    input_file: Path | None = option(None, "requests in OpenAI's batch format, one JSON object a line; required", "-i")
    output_file: Path | None = option(
        None, "the answers; requests that it has answers to are not sent again; required", "-o"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("input_file", "output_file"):
            if getattr(self, name) is None:
                raise ValueError(f"no {name}; give --{name.replace('_', '-')} FILE")


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """The limits that have no option."""

    request_timeout_s: float = 60.0  # from the first byte, or from the connection, to the last byte of a request
    response_timeout_s: float = 60.0  # longest time of a client that leaves a response unread, or sends a refused body
    stall_timeout_s: float = 30.0  # longest time without a step while requests are live; --step-timeout limits a step
    max_bodies: int = 64  # memory limit of all bodies, in bodies of the maximum length
    max_connections: int | None = None  # None: as many as the limit of open files allows


def read_template(path: str | None) -> str | None:
    """Return the text of a chat template; raises ValueError if the file cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat_template={path!r} cannot be read: {error}") from error
