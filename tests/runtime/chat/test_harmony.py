"""Harmony, gpt-oss's format: answers cut anywhere, prompts that end anywhere, grammars, and the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import llguidance
import pytest

from lockstep.runtime.chat.call_readers import AnswerPart
from lockstep.runtime.chat.chat_formats import ChatFormat, find_format
from lockstep.runtime.chat.harmony_parser import HarmonyParser
from lockstep.runtime.chat.tool_grammar import ToolGrammar, ToolRules
from lockstep.runtime.chat.tool_schemas import ToolSchema
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.sampling.grammar import Vocabulary, load_tokenizer
from lockstep.runtime.structured_outputs import StructuredOutputsParams

PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>Should I?<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"n": 3}<|call|>'
TOOL = ToolSchema(
    "look",
    parameters={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
)
REASONING, LOOK = ("reasoning", "Should I?"), [("call", "look"), ("arguments", '{"n": 3}')]

ANSWERS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "reasoning and answer": (
        f"{ANALYSIS}<|channel|>final<|message|>Yes.\n <b<|return|>",
        [REASONING, ("content", "Yes.\n <b")],
    ),
    "without the end marker": (f"{ANALYSIS}<|channel|>final<|message|>Yes", [REASONING, ("content", "Yes")]),
    "call": (ANALYSIS + CALL, [REASONING, *LOOK]),
    "call without its end marker": (ANALYSIS + CALL.removesuffix("<|call|>"), [REASONING, *LOOK]),
    "recipient before the channel": (
        ' to=functions.look<|channel|>commentary json<|message|>{"n": 3}<|call|>',
        LOOK,
    ),
    "call in the analysis channel": (CALL.replace("commentary", "analysis"), LOOK),
    "built-in tool": (
        "<|channel|>analysis to=python code<|message|>1<|call|>", [("call", "python"), ("arguments", "1")],
    ),
    "text before a call": (
        f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
        [("content", "I look."), *LOOK],
    ),
    "two calls": (f"{CALL}<|start|>assistant{CALL}", [*LOOK, *LOOK]),
    "no arguments": (
        "<|channel|>commentary to=functions.now<|message|><|call|>", [("call", "now"), ("arguments", "{}")],
    ),
    "arguments that end early": (CALL[: CALL.index(" 3")], [("call", "look"), ("arguments", '{"n":')]),
    "reasoning twice": (f"{ANALYSIS}{ANALYSIS}", [("reasoning", "Should I?Should I?")]),
    "no end of a message": (
        "<|channel|>analysis<|message|>Should I?<|channel|>final<|message|>No",
        [REASONING, ("content", "No")],
    ),
    "no header": ("Hello <|", [("content", "Hello <|")]),
    "an end within a header": ("<|channel|>fin", []),
}  # fmt: skip


def parse(parser: HarmonyParser, pieces: Sequence[str], *, is_cut: bool = False) -> list[tuple[str, str]]:
    parts: list[AnswerPart] = [part for piece in pieces for part in parser.push(piece)] + parser.finish(is_cut=is_cut)
    joined: list[tuple[str, str]] = []
    for kind, text in parts:
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


@pytest.mark.parametrize("name", ANSWERS)
def test_cut_anywhere_the_parts_are_the_same(name: str) -> None:
    text, expected = ANSWERS[name]
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        assert parse(HarmonyParser(PROMPT, returns_calls=True), pieces) == expected


def test_cut_answer_has_no_part_of_a_header_or_a_marker() -> None:
    answers = [
        ANALYSIS + CALL, ANSWERS["recipient before the channel"][0], ANSWERS["text before a call"][0],
        ANSWERS["reasoning and answer"][0],
    ]  # fmt: skip
    wholes = {
        "reasoning": ["Should I?"],
        "call": ["look"],
        "arguments": ['{"n": 3}'],
        "content": ["Yes.\n <b", "I look."],
    }
    for text in answers:
        for end in range(len(text)):
            for kind, part in parse(HarmonyParser(PROMPT, returns_calls=True), list(text[:end]), is_cut=True):
                assert any(whole.startswith(part) for whole in wholes[kind])
                assert kind != "call" or part == "look"
    assert parse(HarmonyParser(PROMPT, returns_calls=True), ["Hello <|"], is_cut=True) == [("content", "Hello")]


def test_without_tools_a_call_is_content() -> None:
    assert parse(HarmonyParser(PROMPT, returns_calls=False), [ANALYSIS + CALL]) == [REASONING, ("content", '{"n": 3}')]


@pytest.mark.parametrize(
    ("prompt", "thinking", "text", "expected"),
    [
        (PROMPT, "unset", "<|channel|>final<|message|>b", [("content", "b")]),
        (PROMPT + "<|channel|>analysis<|message|>a", "open", "b<|end|>", [("reasoning", "b")]),
        (PROMPT + ANALYSIS + "<|channel|>final<|message|>a", "closed", "b", [("content", "b")]),
        (PROMPT + "<|channel|>final", "unset", "<|message|>b", [("content", "b")]),
    ],
)
def test_prompt_may_end_anywhere(prompt: str, thinking: str, text: str, expected: list[tuple[str, str]]) -> None:
    chat_format = ChatFormat(harmony=True)
    assert chat_format.thinking(prompt) == thinking
    assert parse(HarmonyParser(prompt, returns_calls=True), [text]) == expected


def test_reasoning_is_known_while_it_lasts() -> None:
    parser, seen = HarmonyParser(PROMPT, returns_calls=True), []
    for piece in (
        "<|channel|>analysis",
        "<|message|>",
        "a",
        "<|end|>",
        "<|start|>assistant<|channel|>final<|message|>",
    ):
        parser.push(piece)
        seen.append(parser.in_reasoning)
    assert seen == [False, True, True, False, False]


def test_format_is_found_in_the_chat_template_and_excludes_others() -> None:
    template = '{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}'
    for names in (("auto", "auto"), ("none", "auto"), ("harmony", "auto"), ("harmony", "harmony")):
        chat_format = find_format(*names, template, None, {"<|channel|>": 5, "<|im_start|>": 6})  # type: ignore[arg-type]
        assert (chat_format.harmony, chat_format.special) == (True, {"<|channel|>": 5})
        assert chat_format.needs_special_tokens(())
        assert chat_format.has_tools
    assert not find_format("hermes", "auto", template, None, {}).harmony
    with pytest.raises(ValueError, match="exclude each other: harmony is a format of reasoning and calls"):
        find_format("harmony", "qwen3", template, None, {})


def test_reasoning_of_a_message_has_the_name_that_the_template_knows() -> None:
    chat_format, call = ChatFormat(harmony=True), {"function": {"name": "look", "arguments": {}}}
    message = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert chat_format.message(message) == {"role": "assistant", "content": "b", "thinking": "a"}
    assert "thinking" not in chat_format.message(message | {"tool_calls": [call]})  # the template takes one of the two
    assert chat_format.message(message | {"tool_calls": [call], "content": ""})["thinking"] == "a"
    assert ChatFormat().message(message) == message


VOCABULARY = Vocabulary(Path(DEMO_MODEL), 2048, (1,))
FINAL = "<|channel|>final<|message|>"
CONTINUED = "<|end|><|start|>assistant"


def matcher(
    rules: ToolRules, thinking: str = "unset", answer: StructuredOutputsParams | None = None
) -> llguidance.LLMatcher:
    params = ToolGrammar(ChatFormat(harmony=True), rules).build(thinking, answer)  # type: ignore[arg-type]
    assert params is not None
    return VOCABULARY.compile(params).matcher()


def accepts(grammar: llguidance.LLMatcher, text: str) -> bool:
    tokens, copy = load_tokenizer(VOCABULARY).tokenize_str(text), grammar.deep_copy()
    return bool(copy.consume_tokens(tokens) and copy.is_accepting())


def test_required_call_follows_its_schema() -> None:
    grammar, call = matcher(ToolRules([TOOL], required=True)), CALL.removesuffix("<|call|>")
    accepted = [
        call,
        ANALYSIS + call,
        call.replace(" <|constrain|>json", ""),
        ANSWERS["recipient before the channel"][0],
    ]
    for text in accepted:
        assert accepts(grammar, text.removesuffix("<|call|>"))
    for wrong in (ANALYSIS, FINAL + "no", call.replace("3", '"3"'), call.replace("look", "see"), "{}", ""):
        assert not accepts(grammar, wrong)
    assert accepts(matcher(ToolRules([TOOL], required=True), "open"), f"b{CONTINUED}{call}")


def test_call_or_answer() -> None:
    grammar, call = matcher(ToolRules([TOOL])), CALL.removesuffix("<|call|>")
    preamble = f"<|channel|>commentary<|message|>I look.{CONTINUED}"
    for text in (FINAL + "yes <b>", ANALYSIS + FINAL + "yes", ANALYSIS + call, preamble + call):
        assert accepts(grammar, text)
    assert not accepts(grammar, call.replace("3", "null"))
    continued = matcher(ToolRules([TOOL]), "closed")
    assert accepts(continued, "yes")
    assert accepts(continued, f"yes{CONTINUED}{call}")


def test_answer_of_a_schema_is_in_the_final_channel() -> None:
    answer = StructuredOutputsParams(json='{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}')
    for rules in (ToolRules(), ToolRules([TOOL])):
        grammar = matcher(rules, answer=answer)
        assert accepts(grammar, ANALYSIS + FINAL + '{"a": 1}')
        assert not accepts(grammar, ANALYSIS + FINAL + '{"a": 2}')
        assert not accepts(grammar, '{"a": 1}')
