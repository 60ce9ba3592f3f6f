"""The text of an exception in one line, for messages and logs. Imports nothing."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
