"""Grammars of tool calls: what they accept, and that random walks through them are calls that their schemas allow."""

from __future__ import annotations

import itertools
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as TEMPLATES

from lockstep.runtime.chat.chat_formats import CALL_FORMATS, REASONING_FORMATS, ChatFormat, Thinking, find_format
from lockstep.runtime.chat.tool_grammar import ToolGrammar, ToolRules
from lockstep.runtime.chat.tool_schemas import ToolSchema, closed, without_annotations
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.sampling.grammar import Vocabulary, load_tokenizer
from lockstep.runtime.structured_outputs import StructuredOutputsParams

from hostile_schemas import random_schema

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
    "long": {"type": "object", "properties": {"s": {"type": "string", "maxLength": 9, "minLength": 3}},
             "required": ["s"]},
    "optional": {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                                                  "b": {"type": "boolean"}}, "required": ["a", "b"]},
    "reference": {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "required": ["p"],
                  "$defs": {"P": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
                                  "additionalProperties": False}}},
    "nullable": {"type": "object", "properties": {"k": {"type": ["string", "null"], "enum": ["C", None]},
                                                  "f": {"type": ["number", "null"]}}, "required": ["k", "f"]},
    "list": {"type": "object", "properties": {"l": {"type": "array", "items": {"type": "integer"}, "minItems": 1,
                                                    "maxItems": 2}}, "required": ["l"], "additionalProperties": False},
    "anything": {"type": "object"},
}  # fmt: skip
TOOLS = [ToolSchema(name, "A tool.", schema) for name, schema in SCHEMAS.items()]
FORMATS = {
    **{name: ChatFormat(REASONING_FORMATS["qwen3"], call_format) for name, call_format in CALL_FORMATS.items()},
    "mistral with [ARGS]": ChatFormat(None, CALL_FORMATS["mistral"], mistral_args=True),
    "special tokens": ChatFormat(REASONING_FORMATS["qwen3"], CALL_FORMATS["hermes"], special={"<tool_call>": 2}),
}
by_format = pytest.mark.parametrize("chat_format", FORMATS.values(), ids=FORMATS)
DESCRIBED = {
    "JSON list": {"open": "<calls>", "close": "</calls>", "content": "json", "transform_each": True,
                  "transform": {"function": {"name": "{tool}", "arguments": "{input}"}}},
    "nested JSON": {"open": ["<call>", "<use>"], "close_pattern": r"\s*</(?:call|use)>", "content": "json",
                    "transform": {"function": {"name": "{content.tool.id}", "arguments": "{content.tool.args}"}}},
    "plain JSON": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
    "Python": {"open": "<call>", "close": "</call>", "content": "python-call-list", "transform_each": True,
               "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}}},
    "lines": {"open_pattern": r"<call (?P<tool>\w+)>\n", "close": "</call>", "content": "kv-lines", "repeats": True,
              "transform": {"function": {"name": "{tool}", "arguments": "{content}"}}},
    "JSON in XML": {"open_pattern": r"<invoke name=\"(?P<name>[^\"]+)\">", "close": "</invoke>",
                    "content": "xml-inline", "repeats": True,
                    "content_args": {"tag_pattern": r"<arg key=\"(?P<key>[^\"]+)\">(?P<value>.*?)</arg>",
                                     "value_parser": {"name": "json"}},
                    "transform": {"function": {"name": "{name}", "arguments": "{content}"}}},
}  # fmt: skip
NOT_EXPRESSED = {("lines", "reference"), ("lines", "list")}


def described(calls: dict[str, Any], special: dict[str, int] | None = None) -> ChatFormat:
    fields = {"reasoning": {"open": "<think>", "close": "</think>"}, "content": {}, "tool_calls": calls}
    template = {"start_anchor": "<|assistant|>", "fields": fields}
    return find_format("response_template", "auto", "", template, special or {})


FORMATS |= {
    **{types[0]: find_format("auto", "auto", "", template, {}) for types, template in TEMPLATES.items()},
    **{name: described(calls) for name, calls in DESCRIBED.items()},
    **{name: find_format(name, "auto", "", None, {}) for name in ("glm45", "minimax_m2", "seed_oss")},
}
HERMES = FORMATS["hermes"]
CLOSINGS = (
    "\n</parameter>",
    "</arg_value>",
    "</parameter>\n</function>",
    '<|"|>',
    '"',
    "\n",
)  # of texts, which few walks end
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
        if len(tokens) >= longest:
            return None
        closing = tokenizer.tokenize_str(rng.choice(CLOSINGS))
        if len(tokens) > 15 and rng.random() < 0.2 and matcher.validate_tokens(closing) == len(closing):
            matcher.consume_tokens(closing)
            tokens += closing
            continue
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
    if chat_format.template and (next(key for key in FORMATS if FORMATS[key] is chat_format), name) in NOT_EXPRESSED:
        with pytest.raises(ValueError, match="may take more than one line"):
            grammar(chat_format, ToolRules([tool], required=True))
        return
    matcher = grammar(chat_format, ToolRules([tool], required=True, parallel=False))
    for _ in range(40):
        if done == 2:
            break
        text = random_walk(matcher.deep_copy(), rng)
        if text is None or "\N{REPLACEMENT CHARACTER}" in text:  # a walk may end within a character
            continue
        parser = chat_format.parser([tool], "")
        assert parser is not None
        parts = [*parser.push(text), *parser.finish(is_cut=False)]
        assert [part for part in parts if part.kind == "call"] == [("call", name)]
        arguments = "".join(part.text for part in parts if part.kind == "arguments")
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        assert {part.kind for part in parts} == {"call", "arguments"}
        done += 1
    assert done or name in ("anything", "text"), "most walks end"


def test_any_schema_makes_a_grammar_or_a_reason() -> None:
    rng = random.Random(1)
    tools = [ToolSchema("f", parameters=p) for p in (random_schema(rng) for _ in range(150)) if isinstance(p, dict)]
    for chat_format, required in itertools.product(FORMATS.values(), (True, False)):
        for tool in tools:
            with suppress(ValueError):
                ToolGrammar(chat_format, ToolRules([tool], required)).build("closed", None)


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
    for schema, reason in (
        ({"anyOf": [{}]}, "it has anyOf beside its properties"),
        ({"properties": {"a>": {}}, "required": ["a>"]}, "a parameter 'a>', which qwen3_coder cannot express"),
        ({"properties": 5}, "its properties are no object"),
        ({"required": 5}, "its required ones are no list"),
        ({"required": [[]]}, "not all named by texts"),
    ):
        with pytest.raises(ValueError, match=reason):
            grammar(FORMATS["qwen3_coder"], ToolRules([ToolSchema("f", parameters=schema)], required=True))


def test_texts_without_quotes_that_cannot_be_checked_are_refused() -> None:
    for schema in ({"type": "string", "pattern": "a"}, {"enum": [1, 2]}, {"type": ["string", "integer"]}):
        tool = ToolSchema("f", parameters={"properties": {"a": schema}, "required": ["a"]})
        with pytest.raises(ValueError, match="neither a plain text nor of one type"):
            grammar(FORMATS["glm45"], ToolRules([tool], required=True))


def test_described_calls_are_free_until_one_begins() -> None:
    matcher = grammar(FORMATS["plain JSON"], ToolRules(TOOLS))
    call = '<call>{"name": "text", "arguments": {"city": "A"}}</call>'
    for text in ("", "Hello {", "<think>a</think>b", "<cal", call, f"a{call}b\n{call}", call.replace('"A"', '"a</b>"')):
        assert accepts(matcher, text)
    for text in ("<call> there", call.replace("text", "other"), call.replace('"A"', "5"), call.replace("A", "</call>")):
        assert not accepts(matcher, text)
    assert not accepts(grammar(FORMATS["plain JSON"], ToolRules(TOOLS, parallel=False)), call + call)
    once = described(DESCRIBED["plain JSON"] | {"repeats": False})
    assert not accepts(grammar(once, ToolRules(TOOLS, required=True)), call + call)
    two = '<calls>[{"tool": "text", "input": {"city": "A"}}, {"tool": "nothing", "input": {}}]</calls>'
    assert accepts(grammar(FORMATS["JSON list"], ToolRules(TOOLS, required=True)), two)


def test_described_reasoning_comes_before_calls_and_answers() -> None:
    call = '<call>{"name": "text", "arguments": {"city": "A"}}</call>'
    required = ToolRules(TOOLS, required=True)
    assert accepts(grammar(FORMATS["plain JSON"], required, "open"), f"a</think>\n{call}")
    assert accepts(grammar(FORMATS["plain JSON"], required, "unset"), f"<think>a</think>{call}")
    assert not accepts(grammar(FORMATS["plain JSON"], required, "open"), call)
    assert accepts(grammar(FORMATS["plain JSON"], ToolRules(TOOLS), "open"), f"a <call> b</think>c{call}")
    answer = StructuredOutputsParams(regex="[0-9]{2}")
    assert accepts(grammar(FORMATS["plain JSON"], ToolRules(), "open", answer), "a</think>42")
    assert not accepts(grammar(FORMATS["plain JSON"], ToolRules(), "open", answer), "42")
    fields = {"reasoning": {"open_pattern": "<t+>", "close": "</t>"}, "tool_calls": DESCRIBED["plain JSON"]}
    chat_format = find_format("auto", "auto", "", {"start_anchor": "<|a|>", "fields": fields}, {})
    assert chat_format.thinking("<|a|><ttt>\n") == "open"
    with pytest.raises(ValueError, match="reasoning whose markers are patterns"):
        grammar(chat_format, required, "open")


def test_special_tokens_of_a_description_are_tokens() -> None:
    chat_format = described(DESCRIBED["plain JSON"], {"<call>": 2})
    matcher = grammar(chat_format, ToolRules(TOOLS, required=True))
    assert matcher.validate_tokens([2]) == 1
    assert matcher.validate_tokens(load_tokenizer(VOCABULARY).tokenize_str("<call>")) == 0
    chat_format = described(DESCRIBED["plain JSON"], {"<think>": 2, "</think>": 3})
    text, call = (
        load_tokenizer(VOCABULARY).tokenize_str(t) for t in ("a", '<call>{"name": "nothing", "arguments": {}}</call>')
    )
    for tokens in ([2, *text], [*text, 2, *text, 3, *call], [2, *call, 3, *text], [2, *text, 3, *text, 2, *text]):
        assert _ends(grammar(chat_format, ToolRules(TOOLS)), tokens)
    assert not _ends(grammar(chat_format, ToolRules(TOOLS)), [*call[:6], 2])


NOT_CONSTRAINED = {
    "no field tool_calls": None,
    "ASSERT": {"open_pattern": r"(?=\[)", "close": "]", "content": "json"},
    "the content 'text'": {"open": "<call>", "close": "</call>", "content": "text"},
    "no name and arguments": {"open": "<call>", "close": "</call>", "content": "json", "transform": {"x": "{content}"}},
    "no opening marker": {"close": "</call>", "content": "json"},
    "cannot be read": {"open_pattern": r"\p{L}<call>", "close": "</call>", "content": "json"},
    "no attribute": {"open": "<call>", "close": "</call>", "content": "json", "content_args": 5},
    "no value between two markers": {
        "open_pattern": "<call (?P<n>a)>",
        "close": "</call>",
        "content": "xml-inline",
        "content_args": {"tag_pattern": "(?P<key>.*)"},
        "transform": {"function": {"name": "{n}", "arguments": "{content}"}},
    },
    "its values have the content 'int'": {
        "open_pattern": "<call (?P<n>.)>",
        "close": "</call>",
        "content": "kv-lines",
        "content_args": {"value_parser": {"name": "int"}},
        "transform": {"function": {"name": "{n}", "arguments": "{content}"}},
    },
}


@pytest.mark.parametrize("reason", NOT_CONSTRAINED)
def test_descriptions_that_no_grammar_can_follow(reason: str) -> None:
    fields: dict[str, Any] = {"tool_calls": NOT_CONSTRAINED[reason]} if NOT_CONSTRAINED[reason] else {"content": {}}
    chat_format = find_format("auto", "auto", "", {"start_anchor": "a", "fields": fields}, {})
    assert chat_format.template is not None
    assert reason in str(chat_format.template.cannot_require)
    assert reason in str(chat_format.template.cannot_begin)


@pytest.mark.parametrize(
    ("name", "call"),
    [("glm45", "<tool_call>text\n<arg_key>city</arg_key>\n<arg_value>A</arg_value>\n</tool_call>"),
     ("minimax_m2", '<minimax:tool_call>\n<invoke name="text">\n<parameter name="city">A</parameter>\n</invoke>\n'
      "</minimax:tool_call>"),
     ("seed_oss", "<seed:tool_call>\n<function=text>\n<parameter=city>A</parameter>\n</function>\n</seed:tool_call>")],
)  # fmt: skip
def test_calls_of_described_formats(name: str, call: str) -> None:
    tools = [tool for tool in TOOLS if tool.name in ("text", "nothing")]
    for rules, text in ((ToolRules(tools, required=True), call), (ToolRules(tools), f"Hello.\n{call}")):
        assert accepts(grammar(FORMATS[name], rules), text)
        assert not accepts(grammar(FORMATS[name], rules), text.replace("text", "other"))
        assert not accepts(grammar(FORMATS[name], rules), text.replace("city", "town"))


def test_calls_that_begin_with_a_word_can_be_required_only() -> None:
    chat_format = described({"open": "call", "close_pattern": "\n|$"[:1], "content": "json"})
    assert chat_format.template is not None
    assert chat_format.template.cannot_require is None
    assert chat_format.template.cannot_begin == "its calls begin with no fixed marker"


def test_a_reference_to_another_place_is_refused() -> None:
    """It would refer to the part that the format writes in one piece."""
    schema = {"properties": {"a": {"type": "array", "items": {"$ref": "#"}, "uniqueItems": False}}, "required": ["a"]}
    tool = ToolSchema("f", parameters=schema)
    for name in ("qwen3_coder", "qwen3_5", "gemma4"):
        with pytest.raises(ValueError, match=r"its \$ref '#' is neither in"):
            grammar(FORMATS[name], ToolRules([tool], required=True))


def test_definitions_may_refer_to_themselves() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}, "additionalProperties": False}
    schema = {"properties": {"a": {"$ref": "#/$defs/N"}}, "required": ["a"], "$defs": {"N": node}}
    matcher = grammar(FORMATS["gemma4"], ToolRules([ToolSchema("f", parameters=schema)], required=True))
    assert accepts(matcher, "<|tool_call>call:f{a:{next:{next:{}}}}<tool_call|>")
    assert not accepts(matcher, "<|tool_call>call:f{a:{next:{x:{}}}}<tool_call|>")


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
