"""Readers of one block of tool calls each: from the text behind its opening marker to pieces of calls.

A reader streams: the name as soon as it is complete, then the arguments as JSON text. What it returns depends on the
text alone, not on how the text was cut.
"""

from __future__ import annotations

import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from .text_scanning import JsonScanner, MarkerSearch

JSON_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.){0,256}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.S
)
MISTRAL_HEAD = re.compile(r"([^\s\[\]{}\"]{1,256})\s*(?:\[CALL_ID\]\s*\w{1,64}\s*)?(?:\[ARGS\]\s*)?(?=\{)")
MISTRAL_NAME = re.compile(
    r"[^\s\[\]{}\"]{0,256}\s*(\[[\w\]\s\[]{0,128})?"
)  # all beginnings of MISTRAL_HEAD, and a few others
BARE_NAME = re.compile(r'\s*\{\s*(?:"(?P<key>\w*)(?P<value>"\s*(?::\s*(?:"(?P<name>[^"\\]*)(?P<end>")?)?)?)?)?')
XML_FUNCTION = re.compile(r"\s*<function=([^>\n]{1,256})>")
XML_PARAMETER = re.compile(r"<parameter=([^>\n]{0,256})>|</function>")
XML_VALUE_ENDS = MarkerSearch(["\n</parameter>", "</parameter>"])


class AnswerPart(NamedTuple):
    """A part of an answer. A `call` piece is the name of a new call, `arguments` is JSON text of the latest call."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


class CallReader(ABC):
    """Reads one block; `rest` is the text behind it once it has ended.

    A block that is no call is given back whole: `rest` is then all of its text and `failed` is set.
    """

    def __init__(self) -> None:
        self.rest: str | None = None
        self.failed = False
        self._buffer = self._block = ""  # what is left to read, and the block as long as it may fail
        self._named = False  # a call was returned

    def push(self, text: str) -> list[AnswerPart]:
        """Return the pieces of calls that are certain with this text."""
        self._buffer += text
        if not self._named:
            self._block += text
        pieces: list[AnswerPart] = []
        while self.rest is None and self._step(pieces):
            pass
        return pieces

    @property
    @abstractmethod
    def in_arguments(self) -> bool:
        """True if the text so far ends within the arguments of a call."""

    def finish(self, *, is_cut: bool) -> list[AnswerPart]:
        """End the text, whose arguments stay as incomplete as they are.

        A block without a name fails, or is dropped if it begins a call and the text was cut.
        """
        if self._named:
            return self._finish(is_cut=is_cut)
        if is_cut and self._begins_call():
            return self._drop()
        self._fail()
        return []

    @abstractmethod
    def _step(self, pieces: list[AnswerPart]) -> bool:
        """Advance in the buffer as far as one state goes; return False if more text is needed."""

    def _finish(self, *, is_cut: bool) -> list[AnswerPart]:
        return self._drop()

    def _begins_call(self) -> bool:
        """Return whether a block without a name is the beginning of a call."""
        return True

    def _drop(self) -> list[AnswerPart]:
        self.rest = ""
        return []

    def _fail(self) -> bool:
        self.failed, self.rest = True, self._block
        return False

    def _end(self, rest: str) -> bool:
        self.rest = rest
        return False

    def _call(self, pieces: list[AnswerPart], name: str) -> None:
        self._named = True
        pieces.append(AnswerPart("call", encodable(name)))

    def _skip_close(self, close: str) -> bool:
        """End the block behind optional whitespace and the closing marker, which may be missing."""
        text = self._buffer.lstrip()
        if text.startswith(close):
            return self._end(text[len(close) :])
        return False if close.startswith(text) else self._end(self._buffer)


class JsonCallReader(CallReader):
    """Reads `{"name": NAME, "arguments": {...}}`, in any order of keys, and the marker `close` behind it.

    The arguments are streamed if the name comes first. With `names`, objects with another name fail.
    """

    def __init__(self, close: str = "", names: Collection[str] | None = None) -> None:
        super().__init__()
        self._close, self._names = close, names
        self._state = "head"
        self._scanner, self._num_scanned = JsonScanner(), 0

    @property
    def in_arguments(self) -> bool:
        return self._state == "arguments"

    def _step(self, pieces: list[AnswerPart]) -> bool:
        match self._state:
            case "head":
                return self._head(pieces)
            case "arguments":
                return self._arguments(pieces)
            case "tail":
                return self._tail()
        return self._skip_close(self._close)

    def _head(self, pieces: list[AnswerPart]) -> bool:
        match = JSON_HEAD.match(self._buffer)
        if match is not None and (name := _loads(match[1])) is not None:
            if self._names is not None and name not in self._names:
                return self._fail()
            self._call(pieces, name)
            self._buffer, self._state, self._scanner = self._buffer[match.end() :], "arguments", JsonScanner()
            return True
        if self._num_scanned == 0 and self._buffer.lstrip()[:1] not in ("", "{"):
            return self._fail()
        end = self._scanner.end(self._buffer[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._buffer) if self._buffer.strip() else 0
            return False
        return self._whole(pieces, self._num_scanned + end)

    def _whole(self, pieces: list[AnswerPart], end: int) -> bool:
        """Take a call of which the whole object is in the buffer."""
        call = _loads(self._buffer[:end])
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or (self._names is not None and name not in self._names):
            return self._fail()
        try:
            arguments = arguments_text(call.get("arguments", call.get("parameters")))
        except (ValueError, RecursionError):
            return self._fail()
        self._call(pieces, name)
        pieces.append(AnswerPart("arguments", arguments))
        self._buffer, self._state = self._buffer[end:], "close"
        return True

    def _arguments(self, pieces: list[AnswerPart]) -> bool:
        end = self._scanner.end(self._buffer)
        if self._buffer:
            pieces.append(AnswerPart("arguments", self._buffer[:end]))
        if end is None:
            self._buffer = ""
            return False
        self._buffer, self._state, self._scanner = self._buffer[end:], "tail", JsonScanner(depth=1)
        return True

    def _begins_call(self) -> bool:
        """Return True behind a marker; without one, whether the first key can be the name of a tool."""
        match = BARE_NAME.match(self._buffer)
        if self._names is None or match is None:
            return self._names is None
        if not match["value"]:
            return "name".startswith(match["key"] or "")
        if match["key"] != "name" or match["name"] is None:
            return match["key"] == "name" and match.end() == len(self._buffer)
        return match["name"] in self._names if match["end"] else any(n.startswith(match["name"]) for n in self._names)

    def _tail(self) -> bool:
        """Skip the rest of the object behind its arguments."""
        end = self._scanner.end(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state = "close"
        return end is not None


class MistralReader(CallReader):
    """Reads what follows `[TOOL_CALLS]`: a JSON list of calls, or a name, perhaps `[ARGS]`, and the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._state = "head"
        self._call_reader = JsonCallReader()
        self._scanner = JsonScanner()

    @property
    def in_arguments(self) -> bool:
        return self._state == "arguments" or (self._state == "call" and self._call_reader.in_arguments)

    def _step(self, pieces: list[AnswerPart]) -> bool:
        match self._state:
            case "head":
                return self._head(pieces)
            case "list":
                return self._list()
            case "call":
                return self._list_call(pieces)
        end = self._scanner.end(self._buffer)
        if self._buffer:
            pieces.append(AnswerPart("arguments", self._buffer[:end]))
        rest, self._buffer = "" if end is None else self._buffer[end:], ""
        return False if end is None else self._end(rest)

    def _head(self, pieces: list[AnswerPart]) -> bool:
        text = self._buffer.lstrip()
        if text.startswith("["):
            self._buffer, self._state = text[1:], "list"
            return True
        match = MISTRAL_HEAD.match(text)
        if match is None:
            return False if MISTRAL_NAME.fullmatch(text) else self._fail()
        self._call(pieces, match[1])
        self._buffer, self._state = text[match.end() :], "arguments"
        return True

    def _list(self) -> bool:
        text = self._buffer.lstrip(", \t\r\n")
        if not text:
            return False
        if text[0] == "]":
            return self._end(text[1:])
        if text[0] != "{":
            return self._end(text) if self._named else self._fail()
        self._buffer, self._call_reader, self._state = text, JsonCallReader(), "call"
        return True

    def _list_call(self, pieces: list[AnswerPart]) -> bool:
        text, self._buffer = self._buffer, ""
        pieces += self._call_reader.push(text)
        self._named |= any(piece.kind == "call" for piece in pieces)
        if self._call_reader.rest is None:
            return False
        self._buffer, self._state = self._call_reader.rest, "list"
        if self._call_reader.failed:
            return self._end(self._buffer) if self._named else self._fail()
        return True


class XmlCallReader(CallReader):
    """Reads `<function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>` as JSON arguments.

    text_parameters  for each tool, the parameters whose values are text; others are JSON, and text where they are not
    """

    def __init__(self, text_parameters: Mapping[str, Collection[str]]) -> None:
        super().__init__()
        self._text_parameters = text_parameters
        self._state, self._name, self._value = "head", "", ""
        self._is_text = self._is_first = True

    @property
    def in_arguments(self) -> bool:
        return self._state in ("parameters", "newline", "value")

    def _step(self, pieces: list[AnswerPart]) -> bool:
        match self._state:
            case "head":
                return self._head(pieces)
            case "parameters":
                return self._parameter(pieces)
            case "newline":
                return self._newline()
            case "value":
                return self._read_value(pieces)
        return self._skip_close("</tool_call>")

    def _head(self, pieces: list[AnswerPart]) -> bool:
        match = XML_FUNCTION.match(self._buffer)
        if match is None:
            text = self._buffer.lstrip()
            begins = "<function=".startswith(text[:10]) and re.fullmatch(r"[^>\n]{0,256}", text[10:])
            return False if begins else self._fail()
        self._name = match[1].strip()
        self._call(pieces, self._name)
        pieces.append(AnswerPart("arguments", "{"))
        self._buffer, self._state = self._buffer[match.end() :], "parameters"
        return True

    def _parameter(self, pieces: list[AnswerPart]) -> bool:
        match = XML_PARAMETER.search(self._buffer)
        if match is None:
            self._buffer = self._buffer[max(self._buffer.rfind("<"), 0) :]
            return False
        self._buffer = self._buffer[match.end() :]
        if match[1] is None:
            pieces.append(AnswerPart("arguments", "}"))
            self._state = "close"
            return True
        key = match[1].strip()
        self._is_text = key in self._text_parameters.get(self._name, ())
        start = f"{'' if self._is_first else ', '}{json.dumps(key, ensure_ascii=False)}: {chr(34) * self._is_text}"
        pieces.append(AnswerPart("arguments", start))
        self._is_first, self._value, self._state = False, "", "newline"
        return True

    def _newline(self) -> bool:
        """Skip the new line between the tag and the value."""
        if not self._buffer:
            return False
        if not self._buffer.startswith("\n</parameter>") and "\n</parameter>".startswith(self._buffer):
            return False
        is_empty = self._buffer.startswith("\n</parameter>")
        self._buffer, self._state = self._buffer if is_empty else self._buffer.removeprefix("\n"), "value"
        return True

    def _read_value(self, pieces: list[AnswerPart]) -> bool:
        match = XML_VALUE_ENDS.find(self._buffer)
        end = match.start() if match else XML_VALUE_ENDS.num_certain(self._buffer)
        self._add(pieces, self._buffer[:end])
        self._buffer = self._buffer[match.end() if match else end :]
        if match is None:
            return False
        pieces.append(AnswerPart("arguments", '"' if self._is_text else _as_json(self._value)))
        self._state = "parameters"
        return True

    def _add(self, pieces: list[AnswerPart], text: str) -> None:
        if not self._is_text:
            self._value += text
        elif text:
            pieces.append(AnswerPart("arguments", json.dumps(text, ensure_ascii=False)[1:-1]))

    def _finish(self, *, is_cut: bool) -> list[AnswerPart]:
        pieces = self._drop()
        if self._state == "value" and not is_cut:
            self._add(pieces, self._buffer)
        return pieces


def _loads(text: str) -> Any:
    """Return the JSON value; None for text that is not JSON."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def arguments_text(value: Any) -> str:
    """Return the arguments of a call as JSON text; some models write them as text within the JSON.

    Raises ValueError for NaN, which is not JSON.
    """
    if isinstance(value, str):
        return encodable(value)
    return encodable(json.dumps({} if value is None else _finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """Return a value with the largest number in place of infinity, which Python reads for numbers such as 1e999."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return math.copysign(sys.float_info.max, value) if isinstance(value, float) and math.isinf(value) else value


def encodable(text: str) -> str:
    """Return a text with `?` in place of surrogates, which JSON's escapes can be and UTF-8 cannot have."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _as_json(text: str) -> str:
    """Return a parameter's value as JSON: its text if that is JSON, else a string."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text.strip(), ensure_ascii=False)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
