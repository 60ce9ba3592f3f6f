"""Search in text that arrives in pieces: for markers, and for the end of a JSON value."""

from __future__ import annotations

import re
from collections.abc import Sequence

IN_STRING = re.compile(r'["\\]')
OUTSIDE_STRINGS = re.compile(r'["{}\[\]]')


class MarkerSearch:
    """Searches a growing text for the first of several markers, none of which is a prefix of another."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        self._prefixes = {marker[:length] for marker in markers for length in range(1, len(marker))}
        self._first = frozenset(marker[0] for marker in markers)
        self._longest = max((len(marker) for marker in markers), default=1) - 1

    def find(self, text: str) -> re.Match[str] | None:
        """Return the match of the first marker."""
        return self._pattern.search(text)

    def num_certain(self, text: str) -> int:
        """Return how many characters of a text without a marker cannot be the beginning of one."""
        tail = text[-self._longest :] if self._longest else ""
        if self._first.isdisjoint(tail):  # the usual case
            return len(text)
        for start in range(len(tail)):
            if tail[start:] in self._prefixes:
                return len(text) - len(tail) + start
        return len(text)


class JsonScanner:
    """Finds the end of a JSON object or array, or of the `depth` objects around the start, by its brackets.

    The cost is one step for each bracket and quote. Wrong JSON is not noticed.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def end(self, text: str) -> int | None:
        """Scan the next piece; return the index behind the bracket that closes the value, if it is in this piece."""
        position = 0
        if self._escaped and text:
            position, self._escaped = 1, False
        while match := (IN_STRING if self._in_string else OUTSIDE_STRINGS).search(text, position):
            position = match.end()
            match match.group():
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._escaped = position == len(text)
                    position += 1
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth == 0:
                        return position
        return None
