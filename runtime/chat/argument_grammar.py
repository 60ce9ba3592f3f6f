"""JSON values in the dialects of chat formats, as rules of llguidance's Lark.

llguidance's own `%json` knows standard JSON only, and no text that must not occur in it. It is used for the schemas
that have no rule here; a text that has the closing marker in such a value ends the call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sampling.grammar import WHITESPACE
from ..structured_outputs import MAX_GRAMMAR_CHARS
from .marker_grammar import MarkerGrammar, literal
from .tool_schemas import OBJECT_RULES, TEXT_RULES, closed, definition_of, with_definitions

MAX_INTEGER = 2**53 - 1  # of JSON in all languages; some parsers refuse larger ones
INTEGER = "/-?(0|[1-9][0-9]{0,14})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,16})?([eE][+-]?[0-9]{1,2})?/"
CHARACTER = r'([^"\\\x00-\x1f]|\\["\\\/bfnrt])'  # of a string between quotes
LENGTHS = frozenset({"minLength", "maxLength"})
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),)
}  # fmt: skip
RULES = [  # that the others use
    f"BLANK: /{WHITESPACE}/", 'BOOLEAN: "true" | "false"', 'comma: BLANK? "," BLANK?', 'colon: BLANK? ":" BLANK?',
]  # fmt: skip
Member = tuple[str, bool]  # the expression of a property, and whether it is required


@dataclass
class ArgumentGrammar:
    """Adds rules to `lark`, and returns the expressions of values.

    ends           regexes that no string may contain, because they end the call
    unquoted_keys  keys that are words have no quotes
    delimiters     what strings have in place of quotes
    only_rules     schemas that have no rule here are refused
    definitions    the `$defs` of the current tool's schema
    """

    lark: list[str]
    markers: MarkerGrammar
    ends: Sequence[str] = ()
    unquoted_keys: bool = False
    delimiters: tuple[str, str] | None = None
    only_rules: bool = False
    definitions: dict[str, Any] = field(default_factory=dict)
    _references: dict[str, str] = field(default_factory=dict)  # the rules of definitions
    _count: int = 0
    _terminals: dict[str, str] = field(default_factory=dict)
    _num_chars: int = 0

    def begin_tool(self, definitions: dict[str, Any]) -> None:
        """Take the definitions of the tool to which the next values belong."""
        self.definitions, self._references = definitions, {}

    def value(self, schema: Any) -> str:
        """Return the expression of a value; raises ValueError for a schema that cannot be expressed."""
        if isinstance(schema, dict):
            if (definition := definition_of(schema, self.definitions)) is not None:
                return self._reference(schema["$ref"], definition)
            kind, others = schema.get("type"), schema.keys() - {"type"}
            choices: Any = [schema["const"]] if others == {"const"} else schema.get("enum")
            if others in ({"enum"}, {"const"}) and _are_scalars(choices, kind):
                return self._any_of([self._scalar(choice) for choice in choices])
            if isinstance(kind, list) and kind and not others:
                return self._any_of([self.value({"type": name}) for name in kind])
            if schema.keys() == {"anyOf"} and isinstance(schema["anyOf"], list) and schema["anyOf"]:
                return self._any_of([self.value(item) for item in schema["anyOf"]])
            if (expression := self._typed(kind, schema)) is not None:
                return expression
        return self._json(schema)

    def _typed(self, kind: Any, schema: dict[str, Any]) -> str | None:
        others = schema.keys() - {"type"}
        if kind == "string" and not others & (TEXT_RULES - LENGTHS | {"enum", "const"}):
            lengths = schema.get("minLength", 0), schema.get("maxLength")
            return self._string(*lengths) if all(_is_count(schema[name]) for name in others & LENGTHS) else None
        if kind in ("integer", "number") and others <= BOUNDS and all(_is_number(schema[name]) for name in others):
            return self._number(kind, schema)
        if kind == "array" and "items" in others and others <= {"items", "minItems", "maxItems"}:
            return self._array(schema) if all(_is_count(schema[name]) for name in others - {"items"}) else None
        if kind == "object" and is_plain_object(schema):
            return self.members("{", self._properties(schema), "}")
        return None

    def members(self, open: str, members: Sequence[Member], close: str) -> str:
        """Return members in their order with commas between them; those that are not required may be missing."""
        starts, rest = [""], ""  # `rest` is what may follow the members so far, seen from the end
        for expression, is_required in reversed(members):
            first = f"{expression} {rest}"
            starts = [first] if is_required else [first, *starts]
            rest = self.rule(f"comma {expression} {rest}" if is_required else f"(comma {expression})? {rest}")
        return f"{literal(open)} BLANK? ({' | '.join(starts)}) BLANK? {literal(close)}"

    def key(self, name: str) -> str:
        """Return the expression of a key in an object."""
        self.check_text(name)
        return literal(name if self.unquoted_keys and re.fullmatch(r"\w+", name) else json.dumps(name))

    def rule(self, expression: str, options: str = "") -> str:
        """Return the name of a new rule."""
        self._count += 1
        self._add(f"v{self._count}{options}: {expression}")
        return f"v{self._count}"

    def text_before(self, close: str, characters: str = r"(.|\n)*", ends: Sequence[str] = ()) -> str:
        """Return the expression of text and of the literal or special token that ends it.

        characters  the regex of the text, in which neither the end of a call nor one of `ends` may come
        """
        text = self._terminal(f"/{characters}/" + self._without([*self.ends, *ends]))
        if close.startswith("<["):
            return f"{text} {close}"
        if not close.startswith('"'):
            raise ValueError("its values end with a pattern")
        return self.rule(f"{text} {close}", "[lazy]")

    def check_text(self, text: str) -> None:
        """Raise ValueError for a text that ends the call."""
        if any(re.search(end, text) for end in self.ends):
            raise ValueError(f"the text {text!r:.64} contains the marker that ends a call")

    def _properties(self, schema: dict[str, Any]) -> list[Member]:
        properties, required = schema["properties"], schema.get("required") or ()
        return [
            (self.rule(f"{self.key(name)} colon {self.value(properties.get(name, True))}"), name in required)
            for name in dict.fromkeys([*properties, *required])
        ]

    def _array(self, schema: dict[str, Any]) -> str:
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high == 0:
            return '"[" BLANK? "]"'
        item = self.rule(self.value(schema["items"]))
        more = f"(comma {item}){{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        items = f"{item} {more}" if low else f"({item} {more})?"
        return f'"[" BLANK? {items} BLANK? "]"'

    def _number(self, kind: str, schema: dict[str, Any]) -> str:
        if schema.keys() == {"type"}:
            return self._terminal(INTEGER if kind == "integer" else NUMBER)
        bounded = dict(schema)
        if not {"minimum", "exclusiveMinimum"} & schema.keys():
            bounded["minimum"] = min(-MAX_INTEGER, schema.get("maximum", 0))
        if not {"maximum", "exclusiveMaximum"} & schema.keys():
            bounded["maximum"] = max(MAX_INTEGER, schema.get("minimum", 0))
        return self.rule(f"%json {json.dumps(bounded)}")

    def _string(self, low: int, high: int | None) -> str:
        """Return a string of so many characters that do not end the call."""
        limit = "" if high is None else high
        if self.delimiters is None:
            return self._terminal(f'/"{CHARACTER}{{{low},{limit}}}"/' + self._without(self.ends))
        open, close = self.delimiters
        first, *rest = self.markers.text(close)
        text = self.text_before(first, f"[^\\x01\\x02]{{{low},{limit}}}", [re.escape(close)] * first.startswith("<["))
        return " ".join([*self.markers.text(open), text, *rest])

    def _scalar(self, value: Any) -> str:
        """Return one value, which is no list and no object."""
        return self._text(value) if isinstance(value, str) else literal(json.dumps(value, allow_nan=False))

    def _text(self, text: str) -> str:
        self.check_text(text)
        if self.delimiters is None:
            return literal(json.dumps(text, ensure_ascii=False))
        open, close = self.delimiters
        if close in text or not text.isprintable():
            raise ValueError(f"the text {text!r:.64} cannot be written in the format of this model")
        return " ".join(self.markers.text(open) + [literal(text)] * bool(text) + self.markers.text(close))

    def _json(self, schema: Any) -> str:
        if isinstance(schema, dict) and schema.get("type") in ("boolean", "null") and len(schema) == 1:
            return "BOOLEAN" if schema["type"] == "boolean" else '"null"'
        if self.only_rules:
            raise ValueError(f"the schema {json.dumps(schema)[:64]} cannot be written in the format of this model")
        whole = with_definitions(schema, self.definitions) | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        return self.rule(f"%json {json.dumps(whole, ensure_ascii=False)}")

    def _reference(self, name: str, definition: Any) -> str:
        """Return the rule of a definition, which may refer to itself."""
        if name not in self._references:
            self._count += 1
            self._references[name] = rule = f"v{self._count}"
            self._add(f"{rule}: {self.value(closed(definition))}")
        return self._references[name]

    def _any_of(self, expressions: Sequence[str]) -> str:
        return f"({' | '.join(expressions)})"

    def _without(self, patterns: Sequence[str]) -> str:
        """Return the rest of a terminal that contains none of the patterns."""
        return "".join(f" & ~/(.|\\n)*({pattern})(.|\\n)*/" for pattern in patterns)

    def _terminal(self, expression: str) -> str:
        """Return the name of a terminal, which all equal ones share."""
        if expression not in self._terminals:
            self._terminals[expression] = f"V{len(self._terminals)}"
            self._add(f"{self._terminals[expression]}: {expression}")
        return self._terminals[expression]

    def _add(self, line: str) -> None:
        """Add a rule; raises ValueError as soon as there are too many of them."""
        self._num_chars += len(line)
        if self._num_chars > MAX_GRAMMAR_CHARS:
            raise ValueError(f"the grammar of its schema has more than {MAX_GRAMMAR_CHARS} characters")
        self.lark.append(line)


def is_plain_object(schema: dict[str, Any]) -> bool:
    """Return whether a schema allows just the properties that it lists."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        schema.get("additionalProperties") is False
        and not OBJECT_RULES & schema.keys()
        and isinstance(properties, dict)
        and (required == [] or _are_texts(required))
    )


def _are_scalars(choices: Any, kind: Any) -> bool:
    """Return whether all choices are texts, numbers, booleans or null, and of the types in a schema that has some."""
    kinds = kind if isinstance(kind, list) else list(SCALARS) if kind is None else [kind]
    allowed = [scalar for name in kinds if isinstance(name, str) for scalar in SCALARS.get(name, ())]
    return isinstance(choices, list) and bool(choices) and all(type(choice) in allowed for choice in choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)
