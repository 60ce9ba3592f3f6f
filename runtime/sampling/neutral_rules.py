"""Rules of JSON schemas that allow everything, which llguidance would refuse as unknown.

Libraries write them for every type: Zod a `propertyNames` for records, Pydantic a `format` for passwords and paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
VALUES = frozenset({"enum", "const", "required", "dependentRequired", "x-guidance"})  # hold no schemas
# Those of JSON Schema. It takes any other one for a note to the reader.
FORMATS = frozenset({
    "date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri",
    "uri-reference", "iri", "iri-reference", "uri-template", "uuid", "json-pointer", "relative-json-pointer", "regex",
})  # fmt: skip


def without_neutral_rules(schema: Any) -> Any:
    """Return a JSON schema that allows the same values, without the rules that allow all of them."""
    return without_rules(schema, _is_neutral)


def without_rules(schema: Any, is_left_out: Callable[[str, Any], bool]) -> Any:
    """Return a JSON schema without the rules of these names and values, here and in the schemas within."""
    if isinstance(schema, list):
        return [without_rules(item, is_left_out) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for name, value in schema.items():
        if name in SCHEMAS_BY_NAME and isinstance(value, dict):
            kept[name] = {key: without_rules(item, is_left_out) for key, item in value.items()}
        elif not is_left_out(name, value):
            kept[name] = value if name in VALUES else without_rules(value, is_left_out)
    return kept


def _is_neutral(rule: str, value: Any) -> bool:
    match rule:
        case "propertyNames":  # names are strings
            return value is True or value in ({}, {"type": "string"})
        case "uniqueItems":
            return value is False
        case "dependentRequired":
            return not value and isinstance(value, dict)
        case "format":
            return isinstance(value, str) and value not in FORMATS
    return False
