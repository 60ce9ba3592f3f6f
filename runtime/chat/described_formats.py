"""Formats of models in the form of transformers' `response_template`, for tokenizers that have none."""

from __future__ import annotations

from typing import Any

_NAMED_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
# By the name of the parser; each is a format of reasoning and calls.
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "glm45": {  # GLM-4.5 to 4.7: <tool_call>NAME <arg_key>KEY</arg_key> <arg_value>VALUE</arg_value> ... </tool_call>
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*(?P<name>[^\s<]+)",
                "close": "</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
                },
                "transform": _NAMED_CALL,
            },
            "content": {"close": ["<|user|>", "<|observation|>", "<|endoftext|>"]},
        },
    },
    "minimax_m2": {  # <minimax:tool_call> <invoke name="NAME"> <parameter name="KEY">VALUE</parameter> </invoke> ...
        "start_anchor": "]~b]ai",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*(?:<minimax:tool_call>\s*)?<invoke name=\"(?P<name>[^\"]+)\">",
                "close_pattern": r"</invoke>(?:\s*</minimax:tool_call>)?",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>"},
                "transform": _NAMED_CALL,
            },
            "content": {"close": ["[e~[", "</minimax:tool_call>"]},  # one that comes late is behind the call
        },
    },
    "seed_oss": {  # <seed:tool_call> <function=NAME> <parameter=KEY>VALUE</parameter> ... </function> </seed:tool_call>
        "start_anchor": "<seed:bos>assistant",
        "fields": {
            "reasoning_content": {"open": "<seed:think>", "close": "</seed:think>"},
            "tool_calls": {
                "open_pattern": r"\s*<seed:tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</seed:tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>"},
                "transform": _NAMED_CALL,
            },
            "content": {"close": ["<seed:eos>"]},
        },
    },
}
SIGNS = {
    "glm45": "<arg_key>",
    "minimax_m2": "<minimax:tool_call>",
    "seed_oss": "<seed:tool_call>",
}  # in a chat template


def described_format(chat_template: str) -> str | None:
    """Return the name of the format that a chat template shows, if it is one of these."""
    return next((name for name, sign in SIGNS.items() if sign in chat_template), None)
