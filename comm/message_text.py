"""Text for messages and logs: an error in one line, numbers of things and of bytes. Imports nothing."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(text: str, otherwise: str = "no message") -> str:
    """Return the last line of a text that is not empty, `otherwise` if there is none."""
    return (text.strip() or otherwise).splitlines()[-1].strip()


def counted(number: int, noun: str) -> str:
    """Return `1 output`, `2 outputs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_bytes(count: int) -> str:
    """Return `14.96 GiB`, `7.4 MiB`, `8 KiB`."""
    if abs(count) >= 0.1 * 2**30:
        return f"{count / 2**30:.2f} GiB"
    value, unit = (count / 2**20, "MiB") if abs(count) >= 2**20 else (count / 2**10, "KiB")
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
