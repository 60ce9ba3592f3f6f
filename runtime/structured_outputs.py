"""The sampling parameters of constrained outputs, with vLLM's names.

The module imports nothing slow, so that the process that checks grammars (runtime/sampling/grammar.py) starts quickly.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

MAX_GRAMMAR_CHARS = 100_000  # longest schema, regex, choices or grammar, as text
TYPES: dict[str, type | tuple[type, ...]] = {
    "json": (str, dict),
    "regex": str,
    "choice": (list, tuple),
    "grammar": str,
    "json_object": bool,
    "llguidance": str,
}
NAMES = {
    "json": "a JSON schema as text or dictionary", "regex": "a string", "choice": "a list of strings",
    "grammar": "a string", "json_object": "True", "llguidance": "a string",
}  # fmt: skip
KINDS = tuple(TYPES)


class StructuredOutputsParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Exactly one constraint of an output: `json`, `regex`, `choice`, `grammar`, `json_object` or `llguidance`.

    The whole output matches it (as with Python's `re.fullmatch`), unless max_tokens or a stop string cuts it short.
    json        a JSON schema, as text or as a dictionary
    grammar     Lark, in llguidance's dialect, or GBNF
    llguidance  a list of grammars in llguidance's JSON form
    Between the parts of a JSON text there may be two blanks, or a new line and its indentation; with
    disable_any_whitespace there is no whitespace.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    llguidance: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        kinds = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(kinds) != 1:
            raise _refused(f"has {' and '.join(kinds) or 'nothing'}; give exactly one of {', '.join(KINDS)}")
        kind = kinds[0]
        if not isinstance(getattr(self, kind), TYPES[kind]):
            raise _refused(f"has {kind} of type {type(getattr(self, kind)).__name__}; give {NAMES[kind]}")
        if self.disable_any_whitespace and kind not in ("json", "json_object"):
            raise _refused(f"has disable_any_whitespace with {self.kind}; it is for json and json_object")
        if self.choice is not None and not (self.choice and all(isinstance(c, str) and c for c in self.choice)):
            raise _refused("has a choice that is not a list of non-empty strings")
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise _refused(f"has {len(self.text)} characters of {self.kind}; at most {MAX_GRAMMAR_CHARS}")

    @classmethod
    def from_value(cls, value: object) -> StructuredOutputsParams:
        """Return `value`, which may be a dictionary of the fields; raises ValueError naming a wrong type or field."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise _refused(f"{value!r:.64} is not a StructuredOutputsParams or a dictionary of its fields")
        if unknown := [name for name in value if name not in cls.__struct_fields__]:
            raise _refused(f"has the unknown field {unknown[0]!r:.64}; there is {', '.join(cls.__struct_fields__)}")
        return cls(**value)

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @property
    def text(self) -> str:
        """The schema, choices, regex or grammar as text; raises ValueError if it cannot be written as JSON."""
        value = getattr(self, self.kind)
        if self.json_object:
            return '{"type": "object"}'
        if isinstance(value, str):
            return value
        try:
            return json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"has {self.kind} that is not JSON: {type(error).__name__}: {error}") from None


def _refused(rule: str) -> ValueError:
    return ValueError(f"structured_outputs={rule}")
