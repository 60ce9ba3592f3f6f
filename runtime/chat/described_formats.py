"""Formats of models in the form of transformers' `response_template`, for tokenizers that have none."""

from __future__ import annotations

from typing import Any

_NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


def _xml_format(
    anchor: str, think: str, open_pattern: str, close: dict[str, str], tag_pattern: str, ends: list[str]
) -> dict[str, Any]:
    """Return a format of reasoning in `think` tags and of calls with a tag for each parameter.

    anchor  the text before an answer
    close   the text or the pattern that ends a call
    ends    texts that end the content
    """
    calls = {
        "open_pattern": open_pattern, **close, "repeats": True, "content": "xml-inline",
        "content_args": {"tag_pattern": tag_pattern}, "transform": _NAMED_CALL,
    }  # fmt: skip
    reasoning = {"open": f"<{think}>", "close": f"</{think}>"}
    fields = {"reasoning_content": reasoning, "tool_calls": calls, "content": {"close": ends}}
    return {"start_anchor": anchor, "fields": fields}


# By the name of the parser; each is a format of reasoning and calls.
DESCRIPTIONS = {
    # GLM-4.5 to 4.7: <tool_call>NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ... </tool_call>
    "glm45": _xml_format(
        "<|assistant|>", "think", r"\s*<tool_call>\s*(?P<name>[^\s<]+)", {"close": "</tool_call>"},
        r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        ["<|user|>", "<|observation|>", "<|endoftext|>"],
    ),
    # <minimax:tool_call> <invoke name="NAME"> <parameter name="KEY">VALUE</parameter> </invoke> ... A closing tag of
    # all calls that comes late is behind the last one, and ends the content.
    "minimax_m2": _xml_format(
        "]~b]ai", "think", r"\s*(?:<minimax:tool_call>\s*)?<invoke name=\"(?P<name>[^\"]+)\">",
        {"close_pattern": r"</invoke>(?:\s*</minimax:tool_call>)?"},
        r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>", ["[e~[", "</minimax:tool_call>"],
    ),
    # <seed:tool_call> <function=NAME> <parameter=KEY>VALUE</parameter> ... </function> </seed:tool_call>
    "seed_oss": _xml_format(
        "<seed:bos>assistant", "seed:think", r"\s*<seed:tool_call>\s*<function=(?P<name>[^>\n]+)>",
        {"close_pattern": r"</function>\s*</seed:tool_call>"},
        r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>", ["<seed:eos>"],
    ),
}  # fmt: skip
SIGNS = {"glm45": "<arg_key>", "minimax_m2": "<minimax:tool_call>", "seed_oss": "<seed:tool_call>"}  # in a template


def described_format(chat_template: str) -> str | None:
    """Return the name of the format that a chat template shows, if it is one of these."""
    return next((name for name, sign in SIGNS.items() if sign in chat_template), None)
