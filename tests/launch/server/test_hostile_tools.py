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
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as TEMPLATES

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.engine.grammar_check import GrammarCheck
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.sampling.grammar import Vocabulary
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, FakeService, Running, fake
from hostile_schemas import TEXTS, random_schema, random_value
from small import SMALL

ROUTES = ["/v1/chat/completions", "/v1/responses", "/v1/messages"]
TEMPERATURE_2 = 2.0


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body; a part of them is valid."""
    route = rng.choice(ROUTES)
    names = rng.sample(["f", "get_weather", "a.b", "x" * 128, "no name"], rng.randrange(1, 4))
    key = "input_schema" if route == "/v1/messages" else "parameters"
    functions = [{"name": name, "description": rng.choice(TEXTS), key: random_schema(rng)} for name in names]
    content = rng.choice([rng.choice(TEXTS), random_value(rng), [{"type": "text", "text": rng.choice(TEXTS)}]])
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


GEMMA = next(template for types, template in TEMPLATES.items() if "gemma4" in types)


@pytest.fixture(params=["hermes", "qwen3_coder", "response_template"])
def compiling(request: pytest.FixtureRequest) -> Iterator[Running]:
    tokenizer = Tokenizer(Path(DEMO_MODEL))
    if request.param == "response_template":
        tokenizer.response_template = GEMMA
    service = FakeService(tokenizer)
    grammars = GrammarCheck(Vocabulary(Path(DEMO_MODEL), 2048, (1,)))
    service.check_grammar = grammars.check  # type: ignore[method-assign]
    reasoning = "qwen3" if tokenizer.response_template is None else "auto"
    running = Running(service, tool_call_parser=request.param, reasoning_parser=reasoning)
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


SCHEMAS: dict[str, dict[str, Any]] = {
    "place": {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]},
                                               "days": {"type": "integer", "minimum": 1, "maximum": 9}},
              "required": ["unit", "days"], "additionalProperties": False},
    "flags": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x", None]}},
              "required": ["b"], "additionalProperties": False},
}  # fmt: skip
POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": ["integer", "null"]}},
         "required": ["x"], "additionalProperties": False}  # fmt: skip
NESTED_SCHEMAS: dict[str, dict[str, Any]] = {
    "path": {"type": "object", "properties": {"at": {"type": "array", "items": {"$ref": "#/$defs/P"}, "minItems": 1,
                                                     "maxItems": 3}}, "required": ["at"], "$defs": {"P": POINT}},
    "move": {"type": "object", "properties": {"to": POINT, "fast": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                                              "size": {"type": "number", "exclusiveMinimum": 0}}, "required": ["size"]},
    "none": {"type": "object", "properties": {}},
}  # fmt: skip
MANY = [
    pytest.param(parser, SCHEMAS | NESTED_SCHEMAS, 25, marks=pytest.mark.nightly)
    for parser in (
        "hermes",
        "qwen3_coder",
        "llama3_json",
        "mistral",
        "harmony",
        "gemma4",
        "qwen3_5",
        "glm45",
        "minimax_m2",
    )
]


@pytest.mark.process
@pytest.mark.parametrize(("parser", "schemas", "count"), [("hermes", SCHEMAS, 4), *MANY])
def test_required_calls_follow_their_schemas_at_temperature_2(
    parser: str, schemas: dict[str, dict[str, Any]], count: int
) -> None:
    engine = AsyncEngine(Config(**SMALL))
    template = next((template for types, template in TEMPLATES.items() if parser in types), None)
    engine.start()
    if template is not None:
        engine.tokenizer.source.response_template = template
    running = Running(engine, tool_call_parser=parser if template is None else "response_template")
    try:
        made = 0
        for seed in range(count):
            response = running.openai.chat.completions.create(
                model="lockstep-demo", messages=CHAT, max_tokens=160, temperature=TEMPERATURE_2, seed=seed, n=4,  # type: ignore[arg-type]
                tool_choice="required", parallel_tool_calls=False,
                tools=[{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()],
            )  # fmt: skip
            for choice in response.choices:
                if choice.finish_reason == "tool_calls":
                    (call,) = choice.message.tool_calls or ()
                    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])  # type: ignore[union-attr]
                    made += 1
        assert made > 2 * count, "most calls fit into the limit"
    finally:
        running.close()
        asyncio.run(engine.close())
