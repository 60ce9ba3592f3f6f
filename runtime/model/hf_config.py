"""Typed access to one JSON object of a checkpoint. Every error names the file, the field, its value and the rule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class HFConfigReader:
    """The fields of `values`; `source` names them in messages. Numbers must be above 0.

    A field must exist unless there is a default; lists and objects are empty if absent. Null counts as absent, as it
    does in transformers.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    @classmethod
    def from_file(cls, path: Path) -> HFConfigReader:
        """Read a file; raises ValueError if it is not one JSON object."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch the file again")
        return cls(values, path.name)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._value(name, default)
        self._check(name, _is_integer(value) and value >= minimum, f"an integer of at least {minimum}")
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        self._check(name, (_is_integer(value) or isinstance(value, float)) and value > 0, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        self._check(name, isinstance(value, bool), "true or false")
        return bool(value)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        self._check(name, isinstance(value, str), "a string")
        return str(value)

    def texts(self, name: str) -> list[str]:
        value = self._value(name, [])
        self._check(name, isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of strings")
        return list(value)

    def integers(self, name: str) -> list[int]:
        """Return the integers `name`, a list or a single one, each at least 0; empty if absent."""
        value = self._value(name, [])
        integers = value if isinstance(value, list) else [value]
        self._check(name, all(_is_integer(x) and x >= 0 for x in integers), "an integer or a list of integers")
        return integers

    def nested(self, name: str) -> HFConfigReader:
        value = self._value(name, {})
        self._check(name, isinstance(value, dict), "an object")
        return HFConfigReader(value, f"{self.source}: {name}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.values[name] if name in self else default
        if value is None:
            raise ValueError(f"{self.source} has no {name}; use the file that came with the checkpoint")
        return value

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{self.source}: {name} is {self.values[name]!r}, it must be {rule}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
