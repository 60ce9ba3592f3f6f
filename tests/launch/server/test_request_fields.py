"""Fields and routes that vLLM's clients use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from fake_engine import CHAT_BODY, COMPLETION, Running, error_of


@pytest.mark.parametrize(("route", "body"), [("completions", COMPLETION), ("chat/completions", CHAT_BODY)])
def test_usage_in_every_chunk(shared: Running, route: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    create = shared.openai.completions.create if route == "completions" else shared.openai.chat.completions.create
    chunks: Any = list(create(**body, stream=True, stream_options=options))  # type: ignore[call-overload]
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[:-1] == sorted(set(counts)), "every chunk but the last has more tokens than the one before"
    assert counts[-1] == body["max_tokens"]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[-1].usage.prompt_tokens}
    silent: Any = list(create(**body, stream=True, stream_options={"continuous_usage_stats": True}))  # type: ignore[call-overload]
    assert {chunk.usage for chunk in silent} == {None}


def test_one_model_of_the_list(run: Callable[..., Running]) -> None:
    running = run(served_model_name=["org/demo", "demo"])
    models = running.http.get("/v1/models").json()["data"]
    assert [running.http.get(f"/v1/models/{model['id']}").json() for model in models] == models
    assert running.openai.models.retrieve("org/demo").id == "org/demo"
    assert {model["root"] for model in models} == {"demo"}
    assert [model["display_name"] for model in models] == ["org/demo", "demo"], "as Anthropic's clients read it"
    times = {
        (datetime.fromisoformat(model["created_at"].replace("Z", "+00:00")).timestamp(), model["created"])
        for model in models
    }
    assert all(created_at == created for created_at, created in times)
    response = running.http.get("/v1/models/other")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_request_id_comes_back(shared: Running) -> None:
    for path in ("/v1/models", "/health", "/nothing"):
        assert shared.http.get(path, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        made = {
            shared.http.get(path, headers={"x-request-id": text}).headers["x-request-id"] for text in ("", "a" * 200)
        }
        assert len(made) == 2
        assert all(len(text) == 32 for text in made)
    assert (
        shared.post("/v1/completions", COMPLETION, headers={"x-request-id": "abc-2"}).headers["x-request-id"] == "abc-2"
    )


def test_lengths_of_requests_are_measured(shared: Running) -> None:
    def counts() -> dict[str, float]:
        lines = [line.rpartition(" ") for line in shared.http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(number) for name, _, number in lines}

    before = counts()
    shared.post("/v1/completions", COMPLETION)
    after = counts()
    for name, grown in (("request_generation_tokens", COMPLETION["max_tokens"]), ("request_prompt_tokens", None)):
        key = f'lockstep:{name}_sum{{engine="0",model_name="demo"}}'
        assert after[key] - before[key] == grown or grown is None
        key = f'lockstep:{name}_count{{engine="0",model_name="demo"}}'
        assert after[key] - before[key] == 1
