"""Random JSON schemas, most of them wrong."""

from __future__ import annotations

import random
from typing import Any

TEXTS = [
    "",
    "x",
    "</think>",
    "<tool_call>",
    "\x00",
    "\ud83d\ude00",
    "é" * 300,
    "{{ 7 * 7 }}",
    '"',
    "\\",
    "a\nb",
    "#/$defs/a",
]
KEYWORDS = [
    "type", "properties", "required", "items", "anyOf", "oneOf", "allOf", "not", "enum", "const", "pattern", "format",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf", "$ref", "$defs", "additionalProperties", "if", "then",
    "prefixItems", "uniqueItems", "minItems", "title", "description", "default", "x-guidance", "dependentRequired",
]  # fmt: skip
TYPES = ["object", "array", "string", "integer", "number", "boolean", "null", "nonsense"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly one that looks like a schema."""
    kind = rng.random()
    if depth > 3 or kind < 0.3:
        return rng.choice([None, True, False, 0, -1, 2**70, 1e308, 0.5, rng.choice(TEXTS), rng.choice(TYPES)])
    if kind < 0.4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYWORDS + TEXTS): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


def random_schema(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return random_value(rng)
    names = rng.sample(["city", "n", "a>b", "x y", "", "é", "<parameter=q>"], rng.randrange(4))
    made = {name: random_value(rng) if rng.random() < 0.6 else {"type": rng.choice(TYPES)} for name in names}
    return {"type": "object", "properties": made, "required": [n for n in names if rng.random() < 0.5]} | (
        {rng.choice(KEYWORDS): random_value(rng)} if rng.random() < 0.3 else {}
    )
