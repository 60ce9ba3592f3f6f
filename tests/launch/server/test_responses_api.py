"""OpenAI's Responses API over a scripted engine, through OpenAI's client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import Running, error_of, fake
from scripted_answers import ANSWER, CALLS

TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}, "strict": True},
    {"type": "function", "name": "now", "parameters": None, "description": "The time.", "strict": False},
]
ASK: dict[str, Any] = {"model": "demo", "input": "Where?", "tools": TOOLS, "max_output_tokens": 200}
CREATED = ["response.created", "response.in_progress"]
ADDED = ["response.output_item.added", "response.content_part.added"]
DONE = ["response.content_part.done", "response.output_item.done"]
ARGUMENTS = "response.function_call_arguments"
CALL = ["response.output_item.added", f"{ARGUMENTS}.delta", f"{ARGUMENTS}.done", "response.output_item.done"]
ORDER = [
    *CREATED, *ADDED, "response.reasoning_text.delta", "response.reasoning_text.done", *DONE,
    *ADDED, "response.output_text.delta", "response.output_text.done", *DONE, *CALL, *CALL, "response.completed",
]  # fmt: skip


@pytest.fixture
def thinking(run: Callable[..., Running]) -> Running:
    running = run(reasoning_parser="qwen3")
    fake(running).script = ANSWER
    return running


def test_items_of_the_output(thinking: Running) -> None:
    response = thinking.openai.responses.create(**ASK, instructions="Be brief.")
    reasoning, message, *calls = response.output
    assert reasoning.content[0].text == "Where?"  # type: ignore[union-attr, index]
    assert message.content[0].text == response.output_text == "I look."  # type: ignore[union-attr, index]
    assert [(c.name, c.arguments) for c in calls] == CALLS  # type: ignore[union-attr]
    assert (response.status, response.instructions, response.store) == ("completed", "Be brief.", False)  # type: ignore[attr-defined]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.usage.input_tokens_details.cached_tokens == 4


def test_stream_has_the_events_in_order_and_the_same_response(thinking: Running) -> None:
    expected = thinking.openai.responses.create(**ASK)
    names, numbers = [], []
    with thinking.openai.responses.stream(**ASK) as stream:
        for event in stream:
            numbers.append(event.sequence_number)
            if not names or names[-1] != event.type or not event.type.endswith("delta"):
                names.append(event.type)
        response = stream.get_final_response()
    assert names == ORDER
    assert numbers == list(range(len(numbers)))
    unequal = {"id", "call_id"}
    assert [item.model_dump(exclude=unequal | {"parsed_arguments"}, exclude_none=True) for item in response.output] == [
        item.model_dump(exclude=unequal, exclude_none=True) for item in expected.output
    ]
    assert response.usage == expected.usage


def test_output_can_be_sent_back(thinking: Running, tokenizer: Tokenizer) -> None:
    output = thinking.openai.responses.create(**ASK).output
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "five"} for call in output[2:]]  # type: ignore[union-attr]
    items: list[Any] = [{"role": "user", "content": "Where?"}, *(item.model_dump() for item in output), *results]
    thinking.openai.responses.create(**{**ASK, "input": items, "max_output_tokens": 1}, instructions="Be brief.")
    prompt = tokenizer.decode(fake(thinking).asked[-1][0], skip_special_tokens=False)
    turn = prompt[prompt.index("<|user|>Be brief.") :]
    assert turn.startswith('<|user|>Be brief.<|user|>Where?<|assistant|>I look.<tool_call>\n{"name": "get_weather"')
    assert turn.count("<tool_call>") == 2
    assert turn.endswith("<|eos|>" + 2 * "<|user|><tool_response>\nfive\n</tool_response>" + "<|assistant|>")


def test_output_that_is_cut_off_is_incomplete(thinking: Running) -> None:
    request = {**ASK, "max_output_tokens": 8}
    response = thinking.openai.responses.create(**request)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [event.type for event in thinking.openai.responses.create(**request, stream=True)][
        -1
    ] == "response.incomplete"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"),
    ({"store": True}, "store"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.colours"]}, "include[0]"),
    ({"tools": [{"type": "file_search"}]}, "tools[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
    ({"max_output_tokens": 10_000}, "input"),
    ({"temprature": 1}, "temprature"),
    ({"model": "gpt"}, "model"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_refused(shared: Running, changes: dict[str, Any], param: str, stream: bool) -> None:
    response = shared.post("/v1/responses", {"input": "x", "stream": stream, **changes})
    assert response.status_code in (400, 404)
    assert error_of(response)["param"] == param


def test_fields_without_effect(shared: Running) -> None:
    neutral = {
        "store": False, "metadata": {"a": "b"}, "prompt_cache_key": "k", "service_tier": "auto", "tools": [],
        "include": ["reasoning.encrypted_content"], "user": "u", "text": {"format": {"type": "text"}},
        "reasoning": {"summary": "auto"}, "parallel_tool_calls": True, "top_logprobs": 0,
    }  # fmt: skip
    assert shared.post("/v1/responses", {"input": "x", "max_output_tokens": 2, **neutral}).status_code == 200


def test_namespaces_of_tools(thinking: Running, tokenizer: Tokenizer) -> None:
    fake(thinking).script = '<tool_call>\n{"name": "clock.now", "arguments": {}}\n</tool_call>'
    function = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
    tools: list[Any] = [
        {"type": "namespace", "name": "clock", "tools": [function]},
        {"type": "web_search", "external_web_access": False},
    ]
    response = thinking.openai.responses.create(**ASK | {"tools": tools})
    (call,) = response.output
    assert (call.name, call.namespace) == ("now", "clock")  # type: ignore[union-attr]
    items: list[Any] = [{"role": "user", "content": "x"}, call.model_dump(exclude_none=True)]
    thinking.openai.responses.create(**ASK | {"tools": tools, "input": items, "max_output_tokens": 1})
    prompt = tokenizer.decode(fake(thinking).asked[-1][0], skip_special_tokens=False)
    assert '<tool_call>\n{"name": "clock.now", "arguments": {}}' in prompt
    assert "web_search" not in prompt
