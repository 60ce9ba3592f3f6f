"""The size of a JSON body by its values, counted before it is parsed.

Parsing takes microseconds for each object and holds the interpreter's lock: the event loop stands still meanwhile. The
counts below take a millisecond for each MiB.
"""

from __future__ import annotations

import re

from .api_errors import ApiError

MAX_PARTS = 50_000  # objects, lists, keys and other strings: 10,000 messages; parsed in 30 ms at most
MAX_ITEMS = 500_000  # entries of lists and objects: the ids of 128 prompts of 3,900 tokens; parsed in 30 ms
STRING = re.compile(rb'"[^"]*"')
OTHER_BYTES = bytes(byte for byte in range(256) if byte not in b'"[{,')


def check_structure(content: bytes, max_items: int = MAX_ITEMS) -> None:
    """Raise ApiError for a body of too many values; `content` need not be valid JSON."""
    parts, items = count_all(content)
    if parts > MAX_PARTS or items > max_items:  # brackets and commas of texts may be among them
        parts, items = count_outside_strings(content)
    for count, limit, kind in ((parts, MAX_PARTS, "objects, lists and strings"), (items, max_items, "list entries")):
        if count > limit:
            message = f"the body has {count} {kind}, but a request takes at most {limit}; send less at once"
            raise ApiError(400, message, code="too_complex")


def count_all(content: bytes) -> tuple[int, int]:
    """Return upper bounds of the numbers of objects, lists and strings, and of entries."""
    return content.count(b'"') // 2 + content.count(b"[") + content.count(b"{"), content.count(b",") + 1


def count_outside_strings(content: bytes) -> tuple[int, int]:
    """Return the numbers of objects, lists and strings, and of entries; of strings alone if they are too many."""
    structure = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, OTHER_BYTES)
    num_strings = structure.count(b'"') // 2
    if num_strings > MAX_PARTS:
        return num_strings, 0
    bare = STRING.sub(b"", structure)
    return num_strings + bare.count(b"[") + bare.count(b"{"), bare.count(b",") + 1
