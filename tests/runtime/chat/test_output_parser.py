"""Answers in every format: recorded texts, cut anywhere, give the same reasoning, content and calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS as TEMPLATES
from transformers.utils.chat_parsing import parse_response

from lockstep.runtime.chat.call_readers import AnswerPart
from lockstep.runtime.chat.chat_formats import CALL_FORMATS, REASONING_FORMATS, ChatFormat, find_format
from lockstep.runtime.chat.described_formats import SIGNS
from lockstep.runtime.chat.output_parser import AnswerParser
from lockstep.runtime.chat.tool_schemas import ToolSchema

WEATHER = ToolSchema(
    "get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
    },
)  # fmt: skip
TOOLS = [WEATHER, ToolSchema("now")]
PARIS = {"city": 'Pa"ris\n', "days": 3}
HERMES = [
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\"ris\\n", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    'I look.<tool_call>{"arguments": {"city": "Pa\\"ris\\n", "days": 3}, "name": "get_weather"}</tool_call>'
    '<tool_call>{"id": 7, "name": "now"}</tool_call>',
    'I look.\n\n<tool_call>\n{"name": "get_weather", "arguments": '
    '"{\\"city\\": \\"Pa\\\\\\"ris\\\\n\\", \\"days\\": 3}"}\n</tool_call>'
    '\n<tool_call>{"name": "now", "arguments": null, "id": "x}"}</tool_call>\n',
]
XML = [
    'I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"ris\n\n</parameter>\n<parameter=days>\n3\n'
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    'I look.<tool_call><function=get_weather><parameter=city>\nPa"ris\n\n</parameter><parameter=days>3</parameter>'
    "</function></tool_call><tool_call><function=now></function></tool_call>",
]
LLAMA = [
    '{"name": "get_weather", "parameters": {"city": "Pa\\"ris\\n", "days": 3}}; {"name": "now", "parameters": {}}',
    '\n{"parameters": {"city": "Pa\\"ris\\n", "days": 3}, "name": "get_weather"}\n{"name": "now", "parameters": {}}\n',
]
MISTRAL = [
    'I look.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Pa\\"ris\\n", "days": 3}}, '
    '{"name": "now", "arguments": {}}]',
    'I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Pa\\"ris\\n", "days": 3}[TOOL_CALLS]now[ARGS]{}',
    'I look. [TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Pa\\"ris\\n", "days": 3}[TOOL_CALLS]now{}',
]
RECORDED = [
    (name, text)
    for name, texts in (("hermes", HERMES), ("qwen3_coder", XML), ("llama3_json", LLAMA), ("mistral", MISTRAL))
    for text in texts
]
by_format = pytest.mark.parametrize(("name", "text"), RECORDED)


def parser_of(name: str, prompt_end: str = "", reasoning: str = "qwen3") -> AnswerParser:
    parser = ChatFormat(REASONING_FORMATS[reasoning], CALL_FORMATS[name]).parser(TOOLS, prompt_end)
    assert parser is not None
    return parser


def join(parts: Sequence[AnswerPart]) -> list[tuple[str, str]]:
    joined: list[tuple[str, str]] = []
    for kind, text in parts:
        if joined and joined[-1][0] == kind != "call":
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def parse(parser: AnswerParser, pieces: Sequence[str], *, is_cut: bool = False) -> list[tuple[str, str]]:
    parts = [part for piece in pieces for part in parser.push(piece)]
    return join([*parts, *parser.finish(is_cut=is_cut)])


def calls_of(parts: Sequence[tuple[str, str]]) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    for kind, text in parts:
        if kind == "call":
            calls.append((text, None))
        elif kind == "arguments":
            calls[-1] = (calls[-1][0], json.loads(text))
    return calls


@by_format
@pytest.mark.parametrize("thought", ["", "<think>\nShould I?\n</think>\n\n"])
def test_cut_anywhere_the_parts_are_the_same(name: str, text: str, thought: str) -> None:
    text = thought + text
    whole = parse(parser_of(name), [text])
    assert calls_of(whole) == [("get_weather", PARIS), ("now", {})]
    assert [text for kind, text in whole if kind == "content"] == ([] if name == "llama3_json" else ["I look."])
    assert [text for kind, text in whole if kind == "reasoning"] == (["Should I?"] if thought else [])
    assert parse(parser_of(name), list(text)) == whole
    for cut in range(len(text)):
        assert parse(parser_of(name), [text[:cut], text[cut:]]) == whole


@by_format
def test_an_output_that_ends_early_does_not_depend_on_cuts_either(name: str, text: str) -> None:
    for end in range(len(text)):
        parts = parse(parser_of(name), [text[:end]])
        assert parse(parser_of(name), list(text[:end])) == parts
        assert parts or not text[:end].strip() or name == "mistral", "no text is lost"


def check_cut(new_parser: Callable[[], AnswerParser | None], text: str, reasoning: str) -> None:
    """Cut an answer after each character: what is shown begins the fields of the whole answer, without any marker."""
    parser = new_parser()
    assert parser is not None
    whole = parse(parser, [text])
    arguments = [text for kind, text in whole if kind == "arguments"]
    for end in range(len(text)):
        for pieces in ([text[:end]], list(text[:end])):
            parser = new_parser()
            assert parser is not None
            parts = parse(parser, pieces, is_cut=True)
            assert reasoning.startswith("".join(text for kind, text in parts if kind == "reasoning").rstrip())
            assert "I look.".startswith("".join(text for kind, text in parts if kind == "content").rstrip())
            names = [text for kind, text in parts if kind == "call"]
            assert names == ["get_weather", "now"][: len(names)], "no name is cut"
            written = [text for kind, text in parts if kind == "arguments"]
            assert all(so_far in (full, full[: len(so_far)]) for so_far, full in zip(written, arguments, strict=False))
        parser = new_parser()
        assert parser is not None
        parser.push(text[:end])
        assert parser.in_arguments == (len(written) < len(names) or written != arguments[: len(written)])


@by_format
def test_cut_answer_has_no_part_of_a_marker_or_a_call_without_name(name: str, text: str) -> None:
    if not text.startswith('\n{"parameters"'):  # without a marker, only an object that begins with a name is a call
        check_cut(lambda: parser_of(name), "<think>\nShould I?\n</think>\n\n" + text, "Should I?")


CUT = {
    "text": ("hermes", "a b \n", [("content", "a b \n")]),
    "a marker that is no call": ("hermes", "write <tool_call> here", [("content", "write <tool_call> here")]),
    "a character that begins a marker": ("hermes", "1 <", [("content", "1")]),
    "a call": ("hermes", 'a <tool_call>{"arguments": {"city": ', [("content", "a")]),
    "a call behind a call": ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_',
                             [("call", "now"), ("arguments", "{}")]),
    "a value": ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>Paris</param",
                [("call", "get_weather"), ("arguments", '{"city": "Paris')]),
    "an object that is no call": ("llama3_json", '{"name": "Paul", "age', [("content", '{"name": "Paul", "age')]),
    "another object": ("llama3_json", '{"type": "object", "na', [("content", '{"type": "object", "na')]),
    "a text as name of a tool": ("llama3_json", '{"name": "get_wea', []),
    "a number as name": ("llama3_json", '{"name": 5', [("content", '{"name": 5')]),
    "what separates calls": ("llama3_json", '{"name": "now", "parameters": {}}; ', [("call", "now"),
                                                                                  ("arguments", "{}")]),
    "a name": ("mistral", "a [TOOL_CALLS]get_w", [("content", "a")]),
    "an item of a list": ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}}, {"name": "get', [
        ("call", "now"), ("arguments", "{}")]),
}  # fmt: skip


@pytest.mark.parametrize("case", CUT)
def test_defined_outcomes_of_cut_answers(case: str) -> None:
    name, text, expected = CUT[case]
    for pieces in ([text], list(text)):
        assert parse(parser_of(name), pieces, is_cut=True) == expected


@pytest.mark.parametrize(
    ("name", "model_type", "text"),
    [("hermes", "qwen3", HERMES[0]), *[("qwen3_coder", "qwen3_5", text) for text in XML]],
)
def test_calls_equal_those_of_transformers(name: str, model_type: str, text: str) -> None:
    template = next(value for types, value in TEMPLATES.items() if model_type in types)
    message = parse_response(text, template, prefix="", tools=[tool.for_template() for tool in TOOLS])
    expected = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    ours = calls_of(parse(parser_of(name), [text]))
    ours[0][1]["city"] = ours[0][1]["city"].strip()  # transformers strips the values of XML
    expected[0][1]["city"] = expected[0][1]["city"].strip()
    assert ours == expected


CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW_PARTS = [("call", "now"), ("arguments", "{}")]
OUTCOMES = {
    "a call inside thinking": (f"<think>a\n{CALL}\nb</think>c", [("reasoning", "a"), *NOW_PARTS, ("reasoning", "b"),
                                                                 ("content", "c")]),
    "a doubled end of thinking": ("<think>a</think>\n</think>\n\nb", [("reasoning", "a"), ("content", "b")]),
    "an end of thinking in the content": ("a </think> b", [("content", "a  b")]),
    "thinking that does not end": ("<think>a", [("reasoning", "a")]),
    "thinking twice": ("<think>a</think>b<think>c</think>d", [("reasoning", "a"), ("content", "b"), ("reasoning", "c"),
                                                              ("content", "d")]),
    "a marker that is no call": ("write <tool_call> here", [("content", "write <tool_call> here")]),
    "a marker before a call": (f"<tool_call>x{CALL}", [("content", "<tool_call>x"), *NOW_PARTS]),
    "a call without a name at the end": ('a <tool_call>\n{"na', [("content", 'a <tool_call>\n{"na')]),
    "a call with a name at the end": ('<tool_call>{"name": "now", "arguments": {"a": "b', [("call", "now"),
                                                                                        ("arguments", '{"a": "b')]),
    "an object that is no call": ('<tool_call>{"a": 1}</tool_call>', [("content", '<tool_call>{"a": 1}</tool_call>')]),
    "the end marker inside a string": (
        '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>\\\\"}}</tool_call>',
        [("call", "now"), ("arguments", '{"a": "</tool_call>\\\\"}')],
    ),
    "no end marker": ('<tool_call>{"name": "now", "arguments": {}} and so', [*NOW_PARTS, ("content", "and so")]),
    "whitespace of the content": ("\n a  b \n", [("content", "\n a  b \n")]),
}  # fmt: skip


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_defined_outcomes(outcome: str) -> None:
    text, expected = OUTCOMES[outcome]
    assert parse(parser_of("hermes"), [text]) == expected
    for cut in range(len(text)):
        assert parse(parser_of("hermes"), [text[:cut], text[cut:]]) == expected


def test_prompt_decides_whether_the_answer_begins_with_reasoning() -> None:
    text = "a</think>b"
    assert parse(parser_of("hermes", "<|assistant|>\n<think>\n"), [text]) == [("reasoning", "a"), ("content", "b")]
    assert parse(parser_of("hermes", "<think>\n\n</think>\n\n"), [text]) == [("content", "ab")]
    assert parse(parser_of("hermes", "", "deepseek_r1"), [text]) == [("reasoning", "a"), ("content", "b")]


def test_llama_text_that_is_no_call_is_content() -> None:
    for text in ("Hello {", '{"name": "unknown", "parameters": {}}', '{"answer": 1}', '{"name": "now"', "{", "; {"):
        for pieces in ([text], list(text)):
            assert parse(parser_of("llama3_json"), pieces) == [("content", text)]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_5", "gemma4"])
def test_response_template_gives_what_transformers_gives(model_type: str) -> None:
    template = next(value for types, value in TEMPLATES.items() if model_type in types)
    text, prefix = {
        "qwen3": ("<think>\na</think>b\n" + CALL, "<|im_start|>assistant\n"),
        "qwen3_5": ("a</think>b\n" + XML[0], "<|im_start|>assistant\n<think>\n"),
        "gemma4": ('<|channel>thought\na<channel|>b<|tool_call>call:now{x:<|"|>y<|"|>}<tool_call|>', "<|turn>model\n"),
    }[model_type]
    chat_format = find_format("auto", "auto", "", template, {})
    expected = parse_response(text, template, prefix=prefix, tools=[tool.for_template() for tool in TOOLS])
    for pieces in ([text], list(text)):
        parser = chat_format.parser(TOOLS, prefix)
        assert parser is not None
        parts = parse(parser, pieces)
        assert "".join(t for kind, t in parts if kind == "reasoning").strip() == expected["reasoning_content"]
        assert "".join(t for kind, t in parts if kind == "content").strip() == expected["content"]
        called = [(c["function"]["name"], c["function"]["arguments"]) for c in expected["tool_calls"]]
        assert calls_of(parts) == called


# The end of the prompt, and an answer in the form of the model's chat template.
DESCRIBED = {
    "glm45": (
        "[gMASK]<sop><|user|>\nWhere?<|assistant|>",
        "\n<think>a</think>\nI look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call><|observation|>",
    ),
    "GLM-4.7": (
        "<|assistant|><think>",
        "a</think>I look.<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call><tool_call>now</tool_call><|observation|>",
    ),
    "minimax_m2": (
        "[e~[\n]~b]ai\n<think>\n",
        'a\n</think>\n\nI look.\n<minimax:tool_call>\n<invoke name="get_weather">\n'
        '<parameter name="city">Paris</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>[e~[',
    ),
    "seed_oss": (
        "<seed:bos>assistant\n",
        "<seed:think>a</seed:think>I look.\n<seed:tool_call>\n<function=get_weather>\n"
        "<parameter=city>Paris</parameter>\n<parameter=days>3</parameter>\n</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n"
        "</seed:tool_call><seed:eos>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIBED)
def test_described_formats_cut_anywhere(name: str) -> None:
    prompt, text = DESCRIBED[name]
    sign = "<arg_key>" if name == "GLM-4.7" else SIGNS[name]
    chat_format = find_format("auto", "auto", f"<think> <tool_call> {sign}", None, {})
    for pieces in (*([text[:cut], text[cut:]] for cut in range(len(text))), list(text)):
        parser = chat_format.parser(TOOLS, prompt)
        assert parser is not None
        parts = parse(parser, pieces)
        assert calls_of(parts) == [("get_weather", {"city": "Paris", "days": 3}), ("now", {})]
        assert [part for part in parts if part[0] in ("reasoning", "content")] == [
            ("reasoning", "a"),
            ("content", "I look."),
        ]


@pytest.mark.parametrize("name", DESCRIBED)
def test_cut_answer_of_a_described_format_has_complete_calls_only(name: str) -> None:
    prompt, text = DESCRIBED[name]
    sign = "<arg_key>" if name == "GLM-4.7" else SIGNS[name]
    chat_format = find_format("auto", "auto", f"<think> <tool_call> {sign}", None, {})
    check_cut(lambda: chat_format.parser(TOOLS, prompt), text, "a")
    parser = chat_format.parser(TOOLS, prompt)
    assert parser is not None
    unclosed = text[: text.index("Paris") + len("Paris")]
    assert calls_of(parse(parser, [unclosed], is_cut=True)) == [], "it would lack a value, and be valid"


def test_cut_answer_of_a_response_template() -> None:
    for template in TEMPLATES.values():
        chat_format = find_format("auto", "auto", "", template, {})
        is_gemma = "<|channel>" in str(template)
        call = (
            "<|tool_call>call:now{x:1}<tool_call|>"
            if is_gemma
            else XML[0].removeprefix("I look.\n")
            if "<function=" in str(template)
            else CALL
        )
        think = ("<|channel>thought\n", "<channel|>") if is_gemma else ("<think>", "</think>")
        text = f"{think[0]}Should I?{think[1]}I look.\n{call}"
        for end in range(len(text)):
            parser = chat_format.parser(TOOLS, "")
            assert parser is not None
            parts = parse(parser, [text[:end]], is_cut=True)
            assert "Should I?".startswith("".join(text for kind, text in parts if kind == "reasoning"))
            assert "I look.".startswith("".join(text for kind, text in parts if kind == "content"))
            calls_of(parts)


def test_cut_answer_of_a_template_whose_calls_do_not_close() -> None:
    calls = {"open": "<|python|>", "content": "json", "transform": {"type": "function", "function": "{content}"}}
    template = {"start_anchor": "<|bot|>", "fields": {"content": {"content": "text"}, "tool_calls": calls}}
    chat_format = find_format("auto", "auto", "", template, {})
    text = 'I look.<|python|>{"name": "now", "arguments": {}}'
    for end in range(len(text) + 1):
        parser = chat_format.parser(TOOLS, "")
        assert parser is not None
        parts = parse(parser, [text[:end]], is_cut=True)
        assert "I look.".startswith("".join(text for kind, text in parts if kind == "content"))
        assert calls_of(parts) == ([("now", {})] if end == len(text) else [])


def test_described_formats_exclude_others() -> None:
    assert find_format("none", "qwen3", SIGNS["glm45"], None, {}).template is None
    assert find_format("auto", "qwen3", "<tool_call>" + SIGNS["glm45"], None, {}).calls is None, "it is not hermes"
    with pytest.raises(ValueError, match="exclude each other: glm45 is a format of reasoning and calls"):
        find_format("glm45", "qwen3", "", None, {})
    with pytest.raises(ValueError, match="exclude each other: response_template is a format of reasoning and calls"):
        find_format("response_template", "qwen3", "", {"start_anchor": "a", "fields": {"content": {}}}, {})


def test_response_template_returns_a_broken_call_as_content() -> None:
    template = next(value for types, value in TEMPLATES.items() if "qwen3" in types)
    for pieces in (["a<tool_call>{x</tool_call>b", "c"], list("a<tool_call>{x</tool_call>bc")):
        parser = find_format("response_template", "auto", "", template, {}).parser(TOOLS, "")
        assert parser is not None
        content = "".join(text for kind, text in parse(parser, pieces) if kind == "content")
        assert content[0] == "a"
        assert "{x" in content
        assert content.endswith("bc")


def test_response_template_drops_whitespace_beside_markers() -> None:
    template = next(value for types, value in TEMPLATES.items() if "qwen3" in types)
    text = '<think>\n a  b\n\n</think>\n\nc\n d \n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    for pieces in ([text], list(text)):
        parser = find_format("auto", "auto", "", template, {}).parser(TOOLS, "<|im_start|>assistant\n")
        assert parser is not None
        parts = parse(parser, pieces)
        assert parts[:2] == [("reasoning", "a  b"), ("content", "c\n d")]


@pytest.mark.parametrize("name", ["hermes", "response_template"])
def test_values_that_json_does_not_have(name: Any) -> None:
    """Escapes of surrogates, which UTF-8 cannot have, and numbers beyond the largest one."""
    template = next(value for types, value in TEMPLATES.items() if "qwen3" in types)
    text = '<tool_call>{"arguments": {"a": "\\ud800", "n": -1e999}, "name": "no\\udfffw"}</tool_call>'
    parser = find_format(name, "auto", "", template, {}).parser(TOOLS, "")
    assert parser is not None
    assert calls_of(parse(parser, [text])) == [("no?w", {"a": "?", "n": -1.7976931348623157e308})]


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral", "qwen3_coder", "harmony", "glm45"])
@pytest.mark.parametrize("depth", [400, 600, 900, 5000])
def test_deep_arguments_are_a_call_or_text(name: Any, depth: int) -> None:
    value = "[" * depth + "]" * depth
    json_call = f'{{"arguments": {{"tags": {value}}}, "name": "get_weather"}}'
    text = {
        "hermes": f"<tool_call>{json_call}</tool_call>", "llama3_json": json_call,
        "mistral": f"[TOOL_CALLS][{json_call}]",
        "qwen3_coder": f"<tool_call><function=get_weather><parameter=tags>{value}</parameter></function></tool_call>",
        "harmony": f"<|channel|>commentary to=functions.get_weather<|message|>{json_call}<|call|>",
        "glm45": f"<tool_call>get_weather<arg_key>tags</arg_key><arg_value>{value}</arg_value></tool_call>",
    }[name]  # fmt: skip
    parser = find_format(name, "auto", "", None, {}).parser(TOOLS, "")
    assert parser is not None
    assert value in "".join(part for _, part in parse(parser, [text])).replace('"', "")


@pytest.mark.parametrize("call", ["{x", "[" * 20_000, "5"])
def test_response_template_takes_what_its_parser_cannot(call: str) -> None:
    template = next(value for types, value in TEMPLATES.items() if "qwen3" in types)
    chat_format = find_format("auto", "auto", "", template, {})
    text = f"a<tool_call>{call}</tool_call>b"
    for prefix, answer in (("", text), ("<|im_start|>assistant\n" + text, "c")):
        parser = chat_format.parser(TOOLS, prefix)
        assert parser is not None
        assert calls_of(parse(parser, [answer])) == []


def test_response_template_leaves_calls_in_the_content_without_tools() -> None:
    prompt, text = DESCRIBED["glm45"]
    parser = find_format("glm45", "auto", "", None, {}).parser((), prompt)
    assert parser is not None
    (reasoning, content) = parse(parser, [text])
    assert reasoning == ("reasoning", "a")
    assert content == ("content", text.partition("</think>\n")[2].removesuffix("<|observation|>"))


def test_response_template_must_be_readable() -> None:
    with pytest.raises(ValueError, match=r"response_template cannot be used: .*start_anchor.*; set tool_call_parser"):
        find_format("auto", "auto", "", {"fields": {"content": {}}}, {})


FOUND = [
    ('<tool_call>\n{"name"...', "hermes", "none"),
    ("<think></think><tool_call>\n<function=", "qwen3_coder", "qwen3"),
    ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", "none"),
    ('{"name": function name, "parameters": dictionary} ipython', "llama3_json", "none"),
    ("[THINK]", "none", "mistral"),
    ("plain", "none", "none"),
]


@pytest.mark.parametrize(("template", "calls", "reasoning"), FOUND)
def test_formats_are_found_in_the_chat_template(template: str, calls: str, reasoning: str) -> None:
    chat_format = find_format("auto", "auto", template, None, {"[TOOL_CALLS]": 5})
    assert chat_format.calls == CALL_FORMATS.get(calls)
    assert chat_format.reasoning == REASONING_FORMATS.get(reasoning)
    assert chat_format.needs_special_tokens(TOOLS) == (calls == "mistral")


def test_response_template_must_exist() -> None:
    with pytest.raises(ValueError, match="tool_call_parser='response_template': this model's tokenizer has no"):
        find_format("response_template", "auto", "", None, {})
