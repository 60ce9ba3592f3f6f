"""Tools and reasoning of /v1/chat/completions over a scripted engine, through OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.outputs import Event
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, FakeService, Running, error_of, fake
from scripted_answers import ANSWER, CALL_TEXT, CALLS

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture
def thinking(run: Callable[..., Running]) -> Running:
    running = run(reasoning_parser="qwen3")
    fake(running).script = ANSWER
    return running


def ask(running: Running, **changes: Any) -> Any:
    fields = {"model": "demo", "messages": CHAT, "tools": TOOLS, "max_tokens": 200, **changes}
    return running.openai.chat.completions.create(**fields)


def test_calls_and_reasoning(thinking: Running) -> None:
    response = ask(thinking, n=2)
    for choice in response.choices:
        message = choice.message
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == CALLS
        assert {c.type for c in message.tool_calls} == {"function"}
        assert (message.reasoning_content, message.reasoning, message.content) == ("Where?", "Where?", "I look.")
        assert choice.finish_reason == "tool_calls"
    ids = [c.id for choice in response.choices for c in choice.message.tool_calls]
    assert len(set(ids)) == 4
    details = response.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < response.usage.completion_tokens


def test_stream_equals_whole(thinking: Running) -> None:
    expected = ask(thinking, n=2)
    chunks = list(ask(thinking, n=2, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        deltas = [c.choices[0].delta for c in chunks[:-1] if c.choices[0].index == index]
        calls: dict[int, dict[str, str]] = {}
        for part in (part for delta in deltas for part in delta.tool_calls or ()):
            if part.index not in calls:
                assert part.type == "function", "the first part has everything but arguments"
                calls[part.index] = {"id": part.id, "name": part.function.name, "arguments": ""}
            else:
                assert part.id is None
                assert part.function.name is None
            calls[part.index]["arguments"] += part.function.arguments
        assert [(c["name"], c["arguments"]) for _, c in sorted(calls.items())] == CALLS
        assert all(c["id"].startswith("call_") for c in calls.values())
        assert "".join(d.content or "" for d in deltas) == "I look."
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Where?"
        assert sum(bool(d.tool_calls) for d in deltas) > 6, "arguments come in pieces"
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("tool_calls") == 2
    assert chunks[-1].usage == expected.usage


HARMONY = (
    "<|channel|>analysis<|message|>Where?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}'
)


def test_harmony_whole_and_streamed(run: Callable[..., Running]) -> None:
    running = run(reasoning_parser="harmony")
    fake(running).script = HARMONY
    response = ask(running)
    message = response.choices[0].message
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == CALLS[:1]
    assert (message.reasoning_content, message.content) == ("Where?", "I look.")
    assert response.choices[0].finish_reason == "tool_calls"
    assert 0 < response.usage.completion_tokens_details.reasoning_tokens < response.usage.completion_tokens
    deltas = [chunk.choices[0].delta for chunk in ask(running, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Where?"
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    parts = [part.function.arguments for delta in deltas for part in delta.tool_calls or ()]
    assert "".join(parts) == CALLS[0][1]
    assert len(parts) > 3, "arguments come in pieces"


def test_openai_stream_helper_accumulates_the_message(thinking: Running) -> None:
    with thinking.openai.chat.completions.stream(
        model="demo",
        messages=CHAT,
        tools=TOOLS,
        max_tokens=200,  # type: ignore[arg-type]
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls or ()] == CALLS
    assert message.content == "I look."


def test_call_that_is_cut_off(thinking: Running) -> None:
    fake(thinking).script = CALL_TEXT
    whole = ask(thinking).usage.completion_tokens
    for max_tokens in range(1, whole):
        choice = ask(thinking, max_tokens=max_tokens).choices[0]
        assert choice.finish_reason == "length"
        assert not choice.message.content, "no part of a call is content"
        for call, (name, arguments) in zip(choice.message.tool_calls or (), CALLS, strict=False):
            assert call.function.name == name
            assert arguments.startswith(call.function.arguments)


@pytest.mark.parametrize("max_tokens", [8, 12, 16])
def test_part_of_a_call_is_content_of_no_api(thinking: Running, max_tokens: int) -> None:
    fake(thinking).script = "I look.\n" + CALL_TEXT
    choice = ask(thinking, max_tokens=max_tokens).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("I look.", None, "length")
    deltas = [chunk.choices[0].delta for chunk in ask(thinking, stream=True, max_tokens=max_tokens)]
    assert "".join(delta.content or "" for delta in deltas) == "I look."
    body = {"model": "demo", "messages": CHAT, "max_tokens": max_tokens}
    answer = thinking.post("/v1/messages", body | {"tools": [{"name": "now", "input_schema": SCHEMA}]}).json()
    assert answer["content"] == [{"type": "text", "text": "I look."}]
    tools: Any = [{"type": "function", "name": "now", "parameters": SCHEMA}]
    response = thinking.openai.responses.create(model="demo", input="a", tools=tools, max_output_tokens=max_tokens)
    assert (response.output_text, response.status, len(response.output)) == ("I look.", "incomplete", 1)


@pytest.mark.parametrize(
    ("reason", "stop_reason", "is_cut"),
    [("length", None, True), ("stop", "\n", True), ("stop", None, False), ("stop", 7, False), (None, None, False)],
)
def test_what_cuts_an_output(reason: Any, stop_reason: Any, is_cut: bool) -> None:
    assert Event(0, "", [], None, reason, stop_reason, [], 0).is_cut == is_cut


def test_include_reasoning_false_leaves_reasoning_out(thinking: Running) -> None:
    message = ask(thinking, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == "I look."
    assert not hasattr(message, "reasoning_content")


def test_without_tools_calls_are_content(thinking: Running) -> None:
    for changes in ({"tools": []}, {"tool_choice": "none"}):
        choice = ask(thinking, **changes).choices[0]
        assert choice.message.content == "I look.\n" + CALL_TEXT
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
        assert fake(thinking).asked[-1][1].structured_outputs is None


def test_prompt_lists_tools_and_repeats_calls(shared: Running, tokenizer: Tokenizer) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"a": [1]}'}, "index": 0}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "five"}], "name": "now"},
    ]
    ask(shared, messages=messages, max_tokens=1)
    prompt = tokenizer.decode(fake(shared).asked[-1][0], skip_special_tokens=False)
    assert '{"type": "function", "function": {"name": "now", "parameters"' in prompt
    assert '<tool_call>\n{"name": "now", "arguments": {"a": [1]}}\n</tool_call><|eos|>' in prompt
    assert prompt.endswith("<|user|><tool_response>\nfive\n</tool_response><|assistant|>")
    ask(shared, messages=CHAT, tool_choice="none", max_tokens=1)
    assert fake(shared).asked[-1][0] == tokenizer.encode_chat(CHAT), "no tools are listed that must not be called"


def test_choice_decides_the_grammar(shared: Running) -> None:
    def grammar(**changes: Any) -> str:
        ask(shared, max_tokens=1, **changes)
        constraint = fake(shared).asked[-1][1].structured_outputs
        assert constraint is not None
        return str(json.loads(constraint.llguidance)["grammars"][0]["lark_grammar"])

    assert "start: calls" in grammar(tool_choice="required")
    assert "start: (head rest)*" in grammar()
    assert "start: (head rest |" in grammar(parallel_tool_calls=False)
    named = grammar(tool_choice={"type": "function", "function": {"name": "now"}})
    assert "get_weather" not in named
    assert "The weather." not in grammar(), "descriptions make no rules"


def test_chosen_tool_works_without_a_format_in_the_template(run: Callable[..., Running]) -> None:
    running = run(tool_call_parser="none")
    fake(running).script = CALL_TEXT
    assert len(ask(running, tool_choice="required").choices[0].message.tool_calls) == 2
    response = running.post("/v1/chat/completions", {"messages": CHAT, "tools": TOOLS})
    assert error_of(response)["param"] == "tools"
    assert "--tool-call-parser" in response.text


def described(calls: dict[str, Any]) -> Running:
    """A server of a model whose response_template describes its calls."""
    tokenizer = Tokenizer(Path(DEMO_MODEL))
    tokenizer.response_template = {"start_anchor": "<|assistant|>", "fields": {"content": {}, "tool_calls": calls}}
    return Running(FakeService(tokenizer))


def test_calls_that_a_response_template_describes() -> None:
    running = described({"open": "<use>", "close": "</use>", "content": "json", "repeats": True})
    try:
        fake(running).script = 'I look. <use>{"name": "now", "arguments": {}}</use>'
        message = ask(running, tool_choice="required").choices[0].message
        assert (message.content, message.tool_calls[0].function.name) == ("I look.", "now")
        constraint = fake(running).asked[-1][1].structured_outputs
        assert constraint is not None
        assert constraint.kind == "llguidance"
    finally:
        running.close()


def test_response_template_that_no_grammar_can_follow() -> None:
    running = described({"open_pattern": r"(?=\[)", "close": "]", "content": "json"})
    try:
        for field, changes in (
            ("tool_choice", {"tool_choice": "required"}),
            ("tools", {"tools": [{"type": "function", "function": {"name": "now", "strict": True}}]}),
            ("parallel_tool_calls", {"parallel_tool_calls": False}),
        ):
            response = running.post("/v1/chat/completions", {"messages": CHAT, "tools": TOOLS, **changes})
            assert response.status_code == 400
            assert error_of(response)["param"] == field
            assert "has ASSERT, which no grammar can express; use tool_choice auto" in response.text
        ask(running)
        assert fake(running).asked[-1][1].structured_outputs is None
    finally:
        running.close()


def test_reasoning_goes_before_a_structured_answer(thinking: Running) -> None:
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ask(thinking, tools=None, response_format=answer)
    constraint = fake(thinking).asked[-1][1].structured_outputs
    assert constraint is not None
    assert constraint.kind == "llguidance"
    ask(thinking, tools=None, response_format={"type": "text"})
    assert fake(thinking).asked[-1][1].structured_outputs is None


def test_stop_string_within_arguments_is_no_end_of_calls(run: Callable[..., Running]) -> None:
    """The finish reason tool_calls promises complete calls."""
    for script, reason in ((CALL_TEXT, "tool_calls"), (CALL_TEXT.partition("ris")[0], "stop")):
        running = run(reasoning_parser="qwen3")
        fake(running).script, fake(running).stop_reason = script, "ris"
        choice = ask(running).choices[0]
        assert choice.finish_reason == reason
        assert choice.message.tool_calls[0].function.name == "get_weather"
