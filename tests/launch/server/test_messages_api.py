"""Anthropic's Messages API over a scripted engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import KEY, Running, fake
from scripted_answers import ANSWER, CALLS

TOOLS = [
    {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "now", "description": "The time.", "input_schema": {"type": "object"}, "cache_control": {"type": "x"}},
]
BODY = {"model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": "Where?"}], "tools": TOOLS}


@pytest.fixture
def thinking(run: Callable[..., Running]) -> Running:
    running = run(reasoning_parser="qwen3")
    fake(running).script = ANSWER
    return running


def events_of(running: Running, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of a stream's events, each under its name."""
    blocks = running.post("/v1/messages", body | {"stream": True}).text.strip().split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_blocks_of_the_reply(thinking: Running) -> None:
    reply = thinking.post("/v1/messages", BODY).json()
    thought, text, *calls = reply["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Where?")
    assert text == {"type": "text", "text": "I look."}
    assert [(c["name"], json.dumps(c["input"])) for c in calls] == CALLS
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", "tool_use")
    assert reply["usage"]["cache_read_input_tokens"] == 4
    assert reply["usage"]["input_tokens"] + 4 == thinking.post("/v1/messages/count_tokens", {
        name: BODY[name] for name in ("model", "messages", "tools")}).json()["input_tokens"]  # fmt: skip


def test_stream_has_the_same_blocks(thinking: Running) -> None:
    reply = thinking.post("/v1/messages", BODY).json()
    events = events_of(thinking, BODY)
    blocks: list[dict[str, Any]] = []
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"] | {"json": ""})
            case "content_block_delta":
                delta = event["delta"]
                field = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "json"}[delta["type"]]
                blocks[event["index"]][field] += delta["partial_json" if field == "json" else field]
            case "content_block_stop":
                text = blocks[event["index"]].pop("json")
                if text:
                    blocks[event["index"]]["input"] = json.loads(text)
    assert [b | {"id": ""} for b in blocks] == [b | {"id": ""} for b in reply["content"]]
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"] == reply["usage"]


def test_conversation_with_results_of_tools(shared: Running, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Where?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "call_1", "name": "now", "input": {"a": 1}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": "five", "is_error": False},
            {"type": "text", "text": "And now?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}]
    assert shared.post("/v1/messages", BODY | {"messages": messages, "system": system, "max_tokens": 1}).is_success
    prompt = tokenizer.decode(fake(shared).asked[-1][0], skip_special_tokens=False)
    assert prompt.endswith(
        '<|user|>Be brief.<|user|>Where?<|assistant|>I look.<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n'
        "</tool_call><|eos|><|user|><tool_response>\nfive\n</tool_response><|user|>And now?<|assistant|>"
    )


def test_choice_of_tools(shared: Running) -> None:
    for choice, rule in (
        ({"type": "any"}, "start: calls"), ({"type": "tool", "name": "now"}, "start: calls"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "start: (head rest |"), ({"type": "none"}, None),
    ):  # fmt: skip
        assert shared.post("/v1/messages", BODY | {"tool_choice": choice, "max_tokens": 1}).is_success
        constraint = fake(shared).asked[-1][1].structured_outputs
        assert (rule in str(constraint.llguidance)) if rule and constraint else constraint is rule


def test_reasons_of_the_end(thinking: Running) -> None:
    assert thinking.post("/v1/messages", BODY | {"max_tokens": 3}).json()["stop_reason"] == "max_tokens"
    assert thinking.post("/v1/messages", {**BODY, "tools": []}).json()["stop_reason"] == "end_turn"


BEGUN = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": '{"name":'}]
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": None}, 400, "max_tokens"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages[0].content"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools[0]"),
    ({"tool_choice": {"type": "tool", "name": "other"}}, 400, "tool_choice"),
    ({"mcp_servers": [{}]}, 400, "mcp_servers"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, 400, "context_management.edits[0]"),
    ({"messages": BEGUN, "output_config": {"format": {"type": "json_schema", "schema": {}}}}, 400, "output_config"),
    ({"colour": 1}, 400, "colour"),
    ({"model": "claude"}, 404, "claude"),
    ({"max_tokens": 10_000}, 400, " + 10000 > 512, decrease input length or `max_tokens`"),
    ({"messages": [{"role": "user", "content": "Who? " * 600}], "max_tokens": 1}, 400, " tokens > 511 maximum"),
    ({"messages": [{"role": "user", "content": "Who? " * 9000}], "max_tokens": 1}, 400, "prompt is too long: "),
]


@pytest.mark.parametrize(("changes", "status", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_in_the_envelope_of_anthropic(shared: Running, changes: dict[str, Any], status: int, text: str) -> None:
    response = shared.post("/v1/messages", BODY | changes)
    assert response.status_code == status
    error = response.json()
    assert set(error) == {"type", "error", "request_id"}
    assert error["request_id"] == response.headers["request-id"]
    assert error["error"]["type"] == ("invalid_request_error" if status == 400 else "not_found_error")
    assert text in error["error"]["message"]


def test_key_of_anthropic_clients(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY])
    assert running.post("/v1/messages", BODY | {"max_tokens": 1}, headers={"x-api-key": KEY}).is_success
    response = running.post("/v1/messages", BODY, headers={"x-api-key": "wrong"})
    assert response.status_code == 401
    assert response.json()["error"]["type"] == "authentication_error"


def test_sizes_of_what_does_not_fit_are_those_that_claude_code_reads(shared: Running) -> None:
    """It lowers max_tokens, or compacts the conversation, after an error in these words."""
    counted = shared.post("/v1/messages/count_tokens", {n: BODY[n] for n in ("model", "messages", "tools")}).json()
    message = shared.post("/v1/messages", BODY | {"max_tokens": 500}).json()["error"]["message"]
    sizes = re.search(r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)", message)
    assert sizes is not None
    assert tuple(map(int, sizes.groups())) == (counted["input_tokens"], 500, 512)
    fits = int(sizes[3]) - int(sizes[1])
    assert shared.post("/v1/messages", BODY | {"max_tokens": fits}).is_success
    long = [{"role": "user", "content": "Who? " * 600}]
    counted = shared.post("/v1/messages/count_tokens", {"model": "demo", "messages": long}).json()
    message = shared.post("/v1/messages", {"model": "demo", "messages": long, "max_tokens": 1}).json()["error"][
        "message"
    ]
    sizes = re.search(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", message)
    assert sizes is not None
    assert tuple(map(int, sizes.groups())) == (counted["input_tokens"], 511)
