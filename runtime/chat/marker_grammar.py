"""Markers of a chat format, texts or patterns, as expressions of llguidance's Lark."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    from re import _parser as pattern_parser  # type: ignore[attr-defined]
else:
    import sre_parse as pattern_parser

CATEGORIES = {
    "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip
CLASSES = frozenset({"IN", "ANY", "NOT_LITERAL"})
REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})
BLANKS = r"[ \t\n]"  # in place of all Unicode whitespace
MAX_BLANKS = 2  # of an unlimited repetition: a confused model writes blanks for ever


class MarkerGrammar:
    """Writes markers for a tokenizer whose special tokens have the ids `special`; TEXT never contains these tokens."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def text(self, text: str) -> list[str]:
        """Return a text as a sequence of literals and special tokens."""
        return [
            f"<[{self._special[piece]}]>" if piece in self._special else literal(piece)
            for piece in self._split.split(text)
            if piece
        ]

    def pattern(
        self, pattern: str, texts: Mapping[str, str], expressions: Mapping[str, str] | None = None
    ) -> list[str]:
        """Return a pattern as a sequence of expressions; some of its groups are these texts and expressions.

        Raises ValueError for a pattern that no grammar can express, and for a text that its group does not match.
        """
        parsed = _parsed(pattern)
        names = {number: name for name, number in parsed.state.groupdict.items()}
        return self._parts(parsed, _Groups(names, texts, expressions or {}))

    def _parts(self, items: Sequence[Any], groups: _Groups) -> list[str]:
        """Return the expressions of a pattern's parts; literals that follow each other are one.

        Python's parser takes the common beginning out of alternatives, which may be the beginning of special tokens.
        """
        parts: list[str] = []
        run: list[Any] = []  # literals
        for kind, value in items:
            if str(kind) == "LITERAL":
                run.append((kind, value))
            elif str(kind) == "SUBPATTERN" and (chosen := groups.expression(value[0], value[3])) is not None:
                parts += [*self._run(run), chosen]
                run = []
            elif str(kind) == "BRANCH":
                branches = (" ".join(self._parts([*run, *branch], groups)) for branch in value[1])
                parts.append(f"({' | '.join(branches)})")
                run = []
            else:
                parts += [*self._run(run), self._part(str(kind), value, groups)]
                run = []
        return parts + self._run(run)

    def _run(self, literals: Sequence[tuple[Any, int]]) -> list[str]:
        return self.text("".join(chr(code) for _, code in literals))

    def _part(self, kind: str, value: Any, groups: _Groups) -> str:
        if kind in CLASSES:
            return f"/{_regex([(kind, value)])}/"
        if kind in REPEATS:
            low, high, items = value
            return self._repeat(low, high, items, groups)
        if kind == "SUBPATTERN":
            return f"({' '.join(self._parts(value[3], groups))})"
        raise ValueError(f"its pattern has {kind}, which no grammar can express")

    def _repeat(self, low: int, high: Any, items: Sequence[Any], groups: _Groups) -> str:
        """Return a repetition. No lexeme is empty, because such lexemes would make the grammar ambiguous."""
        is_class = len(items) == 1 and str(items[0][0]) in CLASSES
        characters = _regex(items)
        if characters == r"[\s]":
            characters, high = BLANKS, min(high, low + MAX_BLANKS)
        limit = "" if high == pattern_parser.MAXREPEAT else high
        if is_class:
            repeated = f"/{characters}{{{max(low, 1)},{limit}}}/"
            return repeated if low else f"({repeated})?"
        return f"({' '.join(self._parts(items, groups))}){{{low},{limit}}}"


def literal(text: str) -> str:
    """Return a text as Lark writes it; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def regex_of(pattern: str) -> str:
    """Return a pattern in the syntax of llguidance's regexes; raises ValueError if that is not possible."""
    return _regex(_parsed(pattern))


@lru_cache(maxsize=32)  # each parameter of each tool has the same pattern
def _parsed(pattern: str) -> Any:
    try:
        return pattern_parser.parse(pattern, re.DOTALL)
    except re.error as error:  # transformers uses the package `regex`, which knows more
        raise ValueError(f"its pattern cannot be read: {error}") from None


class _Groups(NamedTuple):
    """What stands for the named groups of a pattern."""

    names: Mapping[int, str]
    texts: Mapping[str, str]
    expressions: Mapping[str, str]

    def expression(self, number: int | None, items: Sequence[Any]) -> str | None:
        """Return what stands for a group; raises ValueError for a text that the group does not match."""
        name = self.names.get(number or 0, "")
        text = self.texts.get(name)
        if text is None:
            return self.expressions.get(name)
        if not re.fullmatch(_regex(items), text):
            raise ValueError(f"the name {text!r:.64} does not match the pattern of names")
        return literal(text)


def _regex(items: Sequence[Any]) -> str:
    return "".join(_regex_part(str(kind), value) for kind, value in items)


def _regex_part(kind: str, value: Any) -> str:
    if kind == "LITERAL":
        return _character(value)
    if kind == "NOT_LITERAL":
        return f"[^{_character(value)}]"
    if kind == "ANY":
        return r"(.|\n)"
    if kind == "IN":
        return f"[{''.join(_member(str(name), member) for name, member in value)}]"
    if kind in REPEATS:
        low, high, items = value
        return f"({_regex(items)}){{{low},{'' if high == pattern_parser.MAXREPEAT else high}}}"
    if kind == "SUBPATTERN":
        return f"({_regex(value[3])})"
    if kind == "BRANCH":
        return f"({'|'.join(map(_regex, value[1]))})"
    raise ValueError(f"its pattern has {kind}, which no grammar can express")


def _member(kind: str, value: Any) -> str:
    """Return a member of a class of characters."""
    match kind:
        case "NEGATE":
            return "^"
        case "LITERAL":
            return _character(value)
        case "RANGE":
            return f"{_character(value[0])}-{_character(value[1])}"
    return CATEGORIES[str(value)]


def _character(code: int) -> str:
    """Return a character as both Python's and Rust's regexes write it."""
    return chr(code) if chr(code).isalnum() else f"\\U{code:08x}"
