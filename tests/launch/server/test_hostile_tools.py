"""Random and hostile tools and messages through all chat APIs, with the real compiler of grammars: only 2xx and 4xx."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.engine.grammar_check import GrammarCheck
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.sampling.grammar import Vocabulary
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, FakeService, Running, fake
from small import SMALL

TEXTS = [
    "",
    "x",
    "</think>",
    "<tool_call>",
    "\x00",
    "\ud83d\ude00",
    "é" * 300,
    "{{ 7 * 7 }}",
    '"',
    "\\",
    "a\nb",
    "#/$defs/a",
]
KEYWORDS = [
    "type", "properties", "required", "items", "anyOf", "oneOf", "allOf", "not", "enum", "const", "pattern", "format",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf", "$ref", "$defs", "additionalProperties", "if", "then",
    "prefixItems", "uniqueItems", "minItems", "title", "description", "default", "x-guidance", "dependentRequired",
]  # fmt: skip
TYPES = ["object", "array", "string", "integer", "number", "boolean", "null", "nonsense"]
ROUTES = ["/v1/chat/completions", "/v1/responses", "/v1/messages"]
TEMPERATURE_2 = 2.0


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly one that looks like a schema."""
    kind = rng.random()
    if depth > 3 or kind < 0.3:
        return rng.choice([None, True, False, 0, -1, 2**70, 1e308, 0.5, rng.choice(TEXTS), rng.choice(TYPES)])
    if kind < 0.4:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYWORDS + TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(5))}


def schema(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return value(rng)
    names = rng.sample(["city", "n", "a>b", "x y", "", "é", "<parameter=q>"], rng.randrange(4))
    made = {name: value(rng) if rng.random() < 0.6 else {"type": rng.choice(TYPES)} for name in names}
    return {"type": "object", "properties": made, "required": [n for n in names if rng.random() < 0.5]} | (
        {rng.choice(KEYWORDS): value(rng)} if rng.random() < 0.3 else {}
    )


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body; a part of them is valid."""
    route = rng.choice(ROUTES)
    names = rng.sample(["f", "get_weather", "a.b", "x" * 128, "no name"], rng.randrange(1, 4))
    key = "input_schema" if route == "/v1/messages" else "parameters"
    functions = [{"name": name, "description": rng.choice(TEXTS), key: schema(rng)} for name in names]
    content = rng.choice([rng.choice(TEXTS), value(rng), [{"type": "text", "text": rng.choice(TEXTS)}]])
    messages = [*CHAT, {"role": rng.choice(["user", "assistant", "tool", "system"]), "content": content}]
    if rng.random() < 0.3:
        call = {"id": "c", "type": "function", "function": {"name": rng.choice(TEXTS), "arguments": rng.choice(TEXTS)}}
        messages.insert(1, {"role": "assistant", "content": None, "tool_calls": [call]})
    body: dict[str, Any] = {"model": "demo", "stream": rng.random() < 0.3}
    if route == "/v1/messages":
        choice: Any = {"type": rng.choice(["auto", "any", "tool"]), "name": names[0]}
        return route, body | {"tools": functions, "messages": messages, "max_tokens": 3, "tool_choice": choice}
    choice = rng.choice(["auto", "required", "none", {"type": "function", "name": names[0], "function": {"name": "f"}}])
    if route == "/v1/responses":
        tools = [{"type": "function", **function} for function in functions]
        return route, body | {"tools": tools, "input": messages, "max_output_tokens": 3, "tool_choice": choice}
    tools = [{"type": "function", "function": function | {"strict": rng.random() < 0.3}} for function in functions]
    return route, body | {"tools": tools, "messages": messages, "max_tokens": 3, "tool_choice": choice}


@pytest.fixture(params=["hermes", "qwen3_coder"])
def compiling(request: pytest.FixtureRequest) -> Iterator[Running]:
    service = FakeService(Tokenizer(Path(DEMO_MODEL)))
    grammars = GrammarCheck(Vocabulary(Path(DEMO_MODEL), 2048, (1,)))
    service.check_grammar = grammars.check  # type: ignore[method-assign]
    running = Running(service, tool_call_parser=request.param, reasoning_parser="qwen3")
    yield running
    running.close()
    grammars.close()


@pytest.mark.process
@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.nightly)])
def test_random_tools_and_messages(compiling: Running, count: int) -> None:
    rng, statuses = random.Random(count), dict[int, int]()
    for _ in range(count):
        route, body = request(rng)
        response = compiling.http.post(
            route, content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert 200 <= response.status_code < 500, (body, response.text)
    assert statuses[200] > count // 50, statuses
    assert fake(compiling).live == 0


@pytest.mark.process
@pytest.mark.parametrize("parser", ["hermes", pytest.param("qwen3_coder", marks=pytest.mark.nightly)])
def test_required_calls_follow_their_schemas_at_temperature_2(parser: str) -> None:
    tools: dict[str, dict[str, Any]] = {
        "place": {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]},
                                                   "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                  "required": ["unit", "days"], "additionalProperties": False},
        "flags": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x", None]}},
                  "required": ["b"], "additionalProperties": False},
    }  # fmt: skip
    engine = AsyncEngine(Config(**SMALL))
    engine.start()
    running = Running(engine, tool_call_parser=parser)
    try:
        made = 0
        for seed in range(4):
            response = running.openai.chat.completions.create(
                model="lockstep-demo", messages=CHAT, max_tokens=120, temperature=TEMPERATURE_2, seed=seed, n=4,  # type: ignore[arg-type]
                tool_choice="required", parallel_tool_calls=False,
                tools=[{"type": "function", "function": {"name": n, "parameters": s}} for n, s in tools.items()],
            )  # fmt: skip
            for choice in response.choices:
                if choice.finish_reason == "tool_calls":
                    (call,) = choice.message.tool_calls or ()
                    jsonschema.validate(json.loads(call.function.arguments), tools[call.function.name])  # type: ignore[union-attr]
                    made += 1
        assert made > 8, "most calls fit into the limit"
    finally:
        running.close()
        asyncio.run(engine.close())
