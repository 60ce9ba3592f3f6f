"""GBNF, llama.cpp's format of grammars, as Lark in llguidance's dialect.

llguidance translates it, but reads some of it otherwise than llama.cpp: escapes in comments, `\\-`, a dot, `[a&&b]`,
and names that differ in `-`, `_` or case alone. These are first written in a form that both read alike.
"""

from __future__ import annotations

import re
import sys
from typing import NoReturn

from llguidance.gbnf_to_lark import gbnf_to_lark

LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:(?!:=))", re.MULTILINE)
TOKEN = re.compile(
    r"""(?P<literal>"(?:[^"\\]|\\.)*")
    | (?P<class>\[(?:[^\]\\]|\\.)*\])
    | (?P<comment>\#[^\r\n]*)
    | (?P<dot>\.)
    | (?P<repetition>\{[^{}]*\})
    | (?P<name>[a-zA-Z0-9_-]+)(?P<defines>[ \t]*::=)?
    | (?P<unfinished>["\[].*)""",
    re.VERBOSE | re.DOTALL,
)
ESCAPE = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\[^xuU]|\\"
CHARACTER = re.compile(f"({ESCAPE}|.)", re.DOTALL)
CHARACTER_OR_RANGE = re.compile(f"({ESCAPE}|.)(?:-({ESCAPE}|.))?", re.DOTALL)
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]", "-": "-"}
ANY_CHARACTER = f"[\\x00-{chr(sys.maxunicode)}]"


def is_gbnf(text: str) -> bool:
    """Return whether a grammar is GBNF, and not Lark."""
    return "::=" in text and LARK.search(text) is None


def to_lark(text: str) -> str:
    """Return a GBNF grammar in Lark; raises ValueError for a mistake."""
    names = _rule_names(text)
    try:
        return gbnf_to_lark(TOKEN.sub(lambda token: _plain_token(text, token, names), text))
    except (ValueError, RecursionError):
        raise
    except Exception as error:  # llguidance raises no narrower class
        raise ValueError(str(error)) from error


def _rule_names(text: str) -> dict[str, str]:
    """Return a name for each rule that Lark tells from the others, by its name in GBNF."""
    names: dict[str, str] = {}
    uses: list[re.Match[str]] = []
    for token in TOKEN.finditer(text):
        if token["unfinished"]:
            _fail(text, token.start(), f"the text or class that begins with {token[0][0]} does not end")
        name = token["name"]
        if name and not token["defines"]:
            uses.append(token)
        elif name:
            if name in names:
                _fail(text, token.start(), f"the rule {name!r} is defined twice")
            is_plain = re.fullmatch("[a-z]+", name) and name != "start"
            names[name] = name if is_plain else f"{re.sub('[^a-z]', '', name.lower()) or 'rule'}{len(names)}"
    for token in uses:
        if token["name"] not in names:
            _fail(text, token.start(), f"the rule {token['name']!r} is not defined")
    return names


def _plain_token(text: str, token: re.Match[str], names: dict[str, str]) -> str:
    match token.lastgroup:
        case "literal":
            return f'"{_plain_characters(text, CHARACTER, token.start() + 1, token.end() - 1)}"'
        case "class":
            negation = "^" if token[0].startswith("[^") else ""
            start = token.start() + 1 + len(negation)
            return f"[{negation}{_plain_characters(text, CHARACTER_OR_RANGE, start, token.end() - 1)}]"
        case "comment":
            return ""
        case "dot":
            return ANY_CHARACTER
        case "name" | "defines":
            return names[token["name"]] + (token["defines"] or "")
    return token[0]


def _plain_characters(text: str, pattern: re.Pattern[str], start: int, end: int) -> str:
    """Return the characters and ranges of a literal or a class without those that mean something in Lark."""
    return "".join(
        "-".join(_plain(text, match.start(group), match[group]) for group in range(1, match.lastindex + 1))
        for match in pattern.finditer(text, start, end)
        if match.lastindex
    )


def _plain(text: str, position: int, character: str) -> str:
    """Return a character, or the one of an escape; ASCII letters and digits alone have no meaning in Lark."""
    if len(character) == 2 and character[1] in ESCAPES:
        character = ESCAPES[character[1]]
    elif len(character) > 2:
        code_point = int(character[2:], 16)
        if 0xD800 <= code_point < 0xE000 or code_point > sys.maxunicode:
            _fail(text, position, f"{character} is no character")
        character = chr(code_point)
    elif character[0] == "\\":
        _fail(text, position, f"the escape {text[position : position + 2]} is unknown or lacks digits")
    return character if character.isalnum() or ord(character) >= 0x80 else f"\\x{ord(character):02x}"


def _fail(text: str, position: int, reason: str) -> NoReturn:
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    raise ValueError(f"line {line}, column {column}: {reason}")
