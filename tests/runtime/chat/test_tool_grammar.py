"""Grammars of tool calls: what they accept, and that random walks through them are calls that their schemas allow."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from lockstep.runtime.chat.chat_formats import CALL_FORMATS, REASONING_FORMATS, ChatFormat, Thinking
from lockstep.runtime.chat.tool_grammar import ToolGrammar, ToolRules
from lockstep.runtime.chat.tool_schemas import ToolSchema, closed, without_annotations
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.sampling.grammar import Vocabulary, load_tokenizer
from lockstep.runtime.structured_outputs import StructuredOutputsParams

VOCABULARY = Vocabulary(Path(DEMO_MODEL), 2048, (1,))
CITY = {"city": {"type": "string", "description": "Where?"}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nothing": {"type": "object", "properties": {}, "additionalProperties": False},
    "text": {"type": "object", "properties": CITY, "required": ["city"]},
    "choice": {"type": "object", "properties": {"unit": {"type": "string", "enum": ["C", "F"]}}, "required": ["unit"]},
    "number": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 40}, **CITY},
               "required": ["n"], "additionalProperties": False},
    "bounded": {"type": "object", "properties": {"s": {"type": "string", "maxLength": 5, "minLength": 1}},
                "required": ["s"]},
    "optional": {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                                                  "b": {"type": "boolean"}}, "required": ["a", "b"]},
    "reference": {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"],
                  "$defs": {"P": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
                                  "additionalProperties": False}}},
    "anything": {"type": "object"},
}  # fmt: skip
TOOLS = [ToolSchema(name, "A tool.", schema) for name, schema in SCHEMAS.items()]
FORMATS = {
    **{name: ChatFormat(REASONING_FORMATS["qwen3"], call_format) for name, call_format in CALL_FORMATS.items()},
    "mistral with [ARGS]": ChatFormat(None, CALL_FORMATS["mistral"], mistral_args=True),
    "special tokens": ChatFormat(REASONING_FORMATS["qwen3"], CALL_FORMATS["hermes"], special={"<tool_call>": 2}),
}
by_format = pytest.mark.parametrize("chat_format", FORMATS.values(), ids=FORMATS)
HERMES = FORMATS["hermes"]
CALL = '<tool_call>\n{"name": "text", "arguments": {"city": "Ai"}}\n</tool_call>'


def grammar(
    chat_format: ChatFormat, rules: ToolRules, thinking: Thinking = "closed", answer: Any = None
) -> llguidance.LLMatcher:
    params = ToolGrammar(chat_format, rules).build(thinking, answer)
    assert params is not None
    return VOCABULARY.compile(params).matcher()


def accepts(matcher: llguidance.LLMatcher, text: str) -> bool:
    tokens = load_tokenizer(VOCABULARY).tokenize_str(text)
    return bool(matcher.deep_copy().validate_tokens(tokens) == len(tokens) and _ends(matcher.deep_copy(), tokens))


def _ends(matcher: llguidance.LLMatcher, tokens: list[int]) -> bool:
    return matcher.consume_tokens(tokens) and matcher.is_accepting()


def random_walk(matcher: llguidance.LLMatcher, rng: random.Random, longest: int = 150) -> str | None:
    """The text of random allowed tokens, up to the end of the grammar; None if it is too long."""
    tokenizer, tokens = load_tokenizer(VOCABULARY), []
    mask = allocate_token_bitmask(1, 2048)
    while not (matcher.is_accepting() and (matcher.is_stopped() or rng.random() < 0.2)):
        if len(tokens) == longest:
            return None
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed[allowed != 1]))
        matcher.consume_token(token)
        tokens.append(token)
    return "".join("<tool_call>" if token == 2 else tokenizer.decode_str([token]) for token in tokens)


@by_format
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_walk_is_a_call_that_the_schema_allows(chat_format: ChatFormat, name: str) -> None:
    tool, rng, done = TOOLS[list(SCHEMAS).index(name)], random.Random(5), 0
    matcher = grammar(chat_format, ToolRules([tool], required=True, parallel=False))
    for _ in range(40):
        if done == 2:
            break
        text = random_walk(matcher.deep_copy(), rng)
        if text is None or "\N{REPLACEMENT CHARACTER}" in text:  # a walk may end within a character
            continue
        parser = chat_format.parser([tool], "")
        assert parser is not None
        parts = [*parser.push(text), *parser.finish()]
        assert [part for part in parts if part.kind == "call"] == [("call", name)]
        arguments = "".join(part.text for part in parts if part.kind == "arguments")
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert {part.kind for part in parts} == {"call", "arguments"}
        done += 1
    assert done or name in ("anything", "text"), "most walks end"


def test_required_starts_with_a_call() -> None:
    matcher = grammar(HERMES, ToolRules(TOOLS, required=True))
    assert accepts(matcher, CALL)
    assert accepts(matcher, CALL + "\n" + CALL)
    for wrong in ("", "Hello", CALL + "!", CALL.replace("text", "other"), CALL.replace('"Ai"', "5"), "Hi " + CALL):
        assert not accepts(matcher, wrong)
    assert not accepts(grammar(HERMES, ToolRules(TOOLS, required=True, parallel=False)), CALL + "\n" + CALL)


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3_coder"])
def test_auto_is_free_until_a_call_begins(name: str) -> None:
    matcher, marker = grammar(FORMATS[name], ToolRules(TOOLS)), CALL_FORMATS[name].markers[0]
    for text in ("", "Hello {", "<think>a</think>b", "<tool", "[TOOL"):
        assert accepts(matcher, text)
    assert not accepts(matcher, f"Hello {marker} there")
    assert not accepts(matcher, f"<think>{marker}</think>")


def test_auto_takes_calls_anywhere() -> None:
    matcher = grammar(HERMES, ToolRules(TOOLS))
    assert accepts(matcher, f"a{CALL}b\n{CALL}")
    assert accepts(matcher, f"<think>a{CALL}b</think>c")
    assert not accepts(matcher, CALL.replace("text", "other"))
    assert not accepts(grammar(HERMES, ToolRules(TOOLS, parallel=False)), f"a{CALL}b{CALL}")
    llama = grammar(FORMATS["llama3_json"], ToolRules(TOOLS))
    assert accepts(llama, '{"name": "text", "parameters": {"city": "x"}}')
    assert accepts(llama, "Hello {}")
    assert not accepts(llama, '{"a": 1}')


def test_reasoning_comes_before_calls_and_answers() -> None:
    required = ToolRules(TOOLS, required=True)
    assert accepts(grammar(HERMES, required, "open"), f"a</think>\n\n{CALL}")
    assert not accepts(grammar(HERMES, required, "open"), CALL)
    assert accepts(grammar(HERMES, required, "unset"), f"<think>a</think>\n{CALL}")
    assert accepts(grammar(HERMES, required, "unset"), CALL)
    assert not accepts(grammar(HERMES, required, "closed"), f"<think>a</think>{CALL}")
    for answer, text in (
        (StructuredOutputsParams(json={"type": "integer"}), "42"),
        (StructuredOutputsParams(regex="[0-9]{2}"), "42"),
        (StructuredOutputsParams(choice=["yes", "42"]), "42"),
        (StructuredOutputsParams(grammar='start: "4" A\nA: "2"'), "42"),
    ):
        assert accepts(grammar(HERMES, ToolRules(), "open", answer), f"a</think>{text}")
        assert accepts(grammar(HERMES, ToolRules(TOOLS), "open", answer), f"a</think>{text}")
        assert accepts(grammar(HERMES, ToolRules(TOOLS), "open", answer), f"a</think>{CALL}")
        assert not accepts(grammar(HERMES, ToolRules(), "open", answer), "a</think>x")
        assert ToolGrammar(HERMES, ToolRules()).build("closed", answer) is answer
    assert ToolGrammar(HERMES, ToolRules()).build("open", None) is None


def test_xml_refuses_what_it_cannot_express() -> None:
    for schema in ({"anyOf": [{}]}, {"properties": {"a>": {}}, "required": ["a>"]}):
        with pytest.raises(ValueError, match=r"tool 'f' has .* which qwen3_coder cannot express"):
            grammar(FORMATS["qwen3_coder"], ToolRules([ToolSchema("f", parameters=schema)], required=True))


def test_annotations_are_left_out_and_parameters_of_these_names_are_not() -> None:
    named = {"description": {"type": "string", "description": "x"}, "title": {"enum": [{"title": 1}]}}
    schema = {"title": "x", "type": "object", "properties": named, "$defs": {"default": {"examples": [1]}}}
    assert without_annotations(schema) == {
        "type": "object",
        "properties": {"description": {"type": "string"}, "title": {"enum": [{"title": 1}]}},
        "$defs": {"default": {}},
    }


def test_objects_have_only_the_properties_that_a_schema_lists() -> None:
    inner = {"type": "object", "properties": {"x": {}}}
    shut = inner | {"additionalProperties": False}
    both = {"allOf": [inner, inner]}
    mixed = {"properties": {"a": inner}, "anyOf": [inner]}
    for schema, expected in (
        (inner, shut),
        ({"properties": {"a": inner}}, {"properties": {"a": shut}, "additionalProperties": False}),
        ({"items": inner}, {"items": shut}),
        ({"anyOf": [inner, {"type": "null"}]}, {"anyOf": [shut, {"type": "null"}]}),
        (mixed, mixed | {"properties": {"a": shut}}),
        (both, both),
        ({"not": inner}, {"not": inner}),
        (inner | {"additionalProperties": True}, inner | {"additionalProperties": True}),
        ({"type": "object"}, {"type": "object"}),
        (True, True),
    ):
        assert closed(schema) == expected
