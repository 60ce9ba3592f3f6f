"""Replies have every field that OpenAI's types require: clients in other languages check what OpenAI's own does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lockstep.launch.errors import EngineFailed

from fake_engine import CHAT, Running, fake
from scripted_answers import ANSWER

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
CHAT_BODY = {
    "model": "demo", "messages": CHAT, "n": 2, "logprobs": True, "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}],
}  # fmt: skip
RESPONSE_BODY = {
    "model": "demo", "input": "Where?", "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    "reasoning": {"effort": "low", "summary": "auto"},
    "tools": [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False},
              {"type": "namespace", "name": "a", "description": "b", "tools": [{"type": "function", "name": "now"}]}],
}  # fmt: skip
SCRIPTS = [ANSWER, "I look.", "<think>\nWhere"]


@pytest.fixture(scope="module")
def events() -> TypeAdapter[Any]:
    return TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def thinking(run: Callable[..., Running]) -> Running:
    return run(reasoning_parser="qwen3")


def streamed(running: Running, path: str, body: dict[str, Any]) -> Iterator[Any]:
    for line in running.post(path, body | {"stream": True}).text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("max_tokens", [2, 30, 200])
def test_replies_are_valid(thinking: Running, events: TypeAdapter[Any], script: str, max_tokens: int) -> None:
    fake(thinking).script = script
    chat, options = CHAT_BODY | {"max_tokens": max_tokens}, {"stream_options": {"include_usage": True}}
    ChatCompletion.model_validate(thinking.post("/v1/chat/completions", chat).json())
    chunks = [
        ChatCompletionChunk.model_validate(chunk)
        for chunk in streamed(thinking, "/v1/chat/completions", chat | options)
    ]
    assert chunks[-1].usage is not None
    completion = {"model": "demo", "prompt": ["a", "b"], "max_tokens": max_tokens, "logprobs": 2}
    assert len(Completion.model_validate(thinking.post("/v1/completions", completion).json()).choices) == 2
    body = RESPONSE_BODY | {"max_output_tokens": max_tokens}
    Response.model_validate(thinking.post("/v1/responses", body).json())
    types = [events.validate_python(event).type for event in streamed(thinking, "/v1/responses", body)]
    assert types[-1] in ("response.completed", "response.incomplete")


def test_failures_are_valid(thinking: Running, events: TypeAdapter[Any]) -> None:
    """Codex reads the last event alone."""
    fake(thinking).script, fake(thinking).fails = "I look. And more.", EngineFailed("the ranks died")
    made = [events.validate_python(event) for event in streamed(thinking, "/v1/responses", RESPONSE_BODY)]
    first, *_, error, last = made
    assert (first.type, error.type, last.type) == ("response.created", "error", "response.failed")
    assert [event.sequence_number for event in made] == list(range(len(made)))
    assert (last.response.status, last.response.id) == ("failed", first.response.id)
    assert (last.response.error.code, last.response.output[0].status) == ("server_error", "incomplete")
    assert "the ranks died" in last.response.error.message
