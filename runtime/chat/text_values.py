"""Values that a format writes without quotes: which texts transformers reads as values that their schema allows."""

from __future__ import annotations

from typing import Any

from .tool_schemas import TEXT_RULES, text_choices

LENGTHS = frozenset({"minLength", "maxLength"})
NULLS = frozenset({"null", "None"})  # texts that are null if the type allows it
ANY = r"(.|\n)"


def types_of(schema: Any) -> set[str]:
    """Return the types of a schema, as transformers finds them."""
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else []
    types = {name for name in names if isinstance(name, str)}
    unions = [schema[union] for union in ("anyOf", "oneOf") if isinstance(schema.get(union), list)]
    return types.union(*(types_of(item) for union in unions for item in union))


def text_regex(schema: Any, character: str = ANY) -> str | None:
    """Return a regex of the texts that a schema allows; None for schemas that allow something else.

    character  the regex of one character. Whitespace at both ends of a text does not count.
    """
    if schema in (True, {}) or (isinstance(schema, dict) and schema == {"type": ["string", "null"]}):
        return f"{character}*"
    if not isinstance(schema, dict):
        return None
    if schema.keys() == {"anyOf"} and isinstance(schema["anyOf"], list):
        is_any = all(item == {"type": "null"} or text_regex(item) == f"{ANY}*" for item in schema["anyOf"])
        return f"{character}*" if is_any else None
    if schema.get("type") != "string" or schema.keys() & (TEXT_RULES - LENGTHS | {"enum", "const"}):
        return None
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if not all(type(length) is int and length >= 0 for length in (low, high or 0)) or high == 0:
        return None
    return _of_length(low, high, character)


def _of_length(low: int, high: int | None, character: str) -> str:
    """Return a regex of so many characters; the least number is counted between two that are not whitespace."""
    limit = "" if high is None else high
    if low == 0:
        return f"{character}{{0,{limit}}}" if high is not None else f"{character}*"
    inner = f"{character}{{{max(low - 2, 0)},{'' if high is None else max(high - 2, 0)}}}"
    return r"[^\s]" if high == 1 else f"[^\\s]{inner}[^\\s]" if low > 1 else f"[^\\s]({inner}[^\\s])?"


def written_choices(schema: Any) -> list[str] | None:
    """Return the texts of the values that a schema lists, those that can be written; None if it lists none."""
    if not isinstance(schema, dict) or not schema.keys() <= {"type", "enum", "const"}:
        return None
    choices, types = text_choices(schema), types_of(schema)
    if choices is None or not types <= {"string", "null"}:
        return None
    is_null = NULLS if "null" in types else frozenset[str]()
    texts = [value for value in choices if isinstance(value, str) and value not in is_null]
    return texts + ["null"] * (None in choices and bool(is_null)) or None
