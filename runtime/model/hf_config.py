"""Typed access to one JSON object of a checkpoint. Every error names the file, the field, its value and the rule."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e30  # float32 ends at 3.4e38
MAX_JSON_BYTES = 256 * 2**20  # the index of the largest checkpoint has 20 MB


class HFConfigReader:
    """The fields of `values`; `source` names them in messages. Numbers must be above 0 and finite.

    A field must exist unless there is a default; lists and objects are empty if absent. Null counts as absent, as it
    does in transformers.
    """

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    @classmethod
    def from_file(cls, path: Path) -> HFConfigReader:
        """Read a file; raises ValueError if it is not one JSON object."""
        check_regular(path)
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object; fetch the file again")
        return cls(values, path.name)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self._value(name, default)
        holds = is_integer(value) and minimum <= value <= maximum
        self._check(name, holds, f"an integer of at least {minimum} and at most {maximum}")
        return int(value)

    def number(self, name: str, default: float | None = None, *, maximum: float = MAX_NUMBER) -> float:
        value = self._value(name, default)
        is_number = is_integer(value) or isinstance(value, float)
        self._check(name, is_number and 0 < value <= maximum, f"a number above 0 and at most {maximum:g}")
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
        """Return the integers `name`, a list or a single one; empty if absent."""
        value = self._value(name, [])
        integers = value if isinstance(value, list) else [value]
        self._check(name, all(is_integer(x) for x in integers), "an integer or a list of integers")
        return integers

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of the list `name`, each above 0."""
        values = self._value(name, None)
        numbers = values if isinstance(values, list) else []
        holds = all((is_integer(x) or isinstance(x, float)) and 0 < x <= MAX_NUMBER for x in numbers)
        self._check(name, bool(numbers) and holds, "a list of numbers above 0")
        return [float(x) for x in numbers]

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
            raise ValueError(
                f"{self.source}: {name} is {shortened(self.values.get(name))}, it must be {rule};"
                " use the file that came with the checkpoint"
            )


def check_regular(path: Path) -> None:
    """Raise ValueError if `path` cannot be read as a regular file: reading a FIFO or a device would never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); fetch the file again") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise ValueError(f"{path} is {kind}, it must be a regular file; fetch the file again")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); change its permissions") from error


def exists(path: Path) -> bool:
    """Return whether there is a file at `path`; raises ValueError if it cannot be read, or is a broken link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); change the permissions of its folder") from error
    check_regular(path)
    return True


def is_integer(value: object) -> bool:
    """Return whether a value from JSON is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
