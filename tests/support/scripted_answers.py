"""Texts that a scripted engine answers with, and the calls in them."""

from __future__ import annotations

CALL_TEXT = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CALLS = [("get_weather", '{"city": "Paris"}'), ("now", "{}")]
ANSWER = "<think>\nWhere?\n</think>\n\nI look.\n" + CALL_TEXT
