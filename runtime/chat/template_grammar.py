"""The calls that a `response_template` describes, as rules of llguidance's Lark.

A template says how an answer is parsed: by the markers of each field, and by the parser of the text between them. The
rules here allow a part of what these parsers take: calls of the tools, with arguments that follow their schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .argument_grammar import RULES, ArgumentGrammar, Member
from .marker_grammar import MarkerGrammar, literal, regex_of
from .text_values import text_regex, types_of, written_choices
from .tool_schemas import ToolSchema, definition_of, parameters_of

if TYPE_CHECKING:
    from transformers.utils.chat_parsing.response_templates import ResponseTemplateField

PLACEHOLDER = re.compile(r"\{(\w+(?:\.\w+)*)\}")
PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:[-.][A-Za-z0-9_]+)*")  # as transformers' parser takes it
READ_TYPES = frozenset({"integer", "number", "boolean", "null", "object", "array"})  # transformers reads such texts
FREE_NAME = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"  # of a parameter that no schema lists
VALUE = "@"  # stands for the value in the parts of a tag
Path = tuple[str, ...]  # the keys that lead to a value


class TemplateCalls:
    """Builds the rules of calls of some tools; raises ValueError if the template or a tool cannot be expressed."""

    def __init__(
        self, field: ResponseTemplateField | None, markers: MarkerGrammar, tools: Sequence[ToolSchema]
    ) -> None:
        if field is None:
            raise ValueError("it has no field tool_calls")
        if field.open_re is None:
            raise ValueError("its calls have no opening marker")
        self._field, self._markers, self._args = field, markers, field.content_args
        self._lark = list(RULES)
        is_json, self._is_python = field.content == "json", field.content == "python-call-list"
        delimiters = [tuple(pair) for pair in self._args.get("string_delims", ())] if is_json else []
        self._values = ArgumentGrammar(
            self._lark, markers, self._ends(), is_json and bool(self._args.get("unquoted_keys")),
            delimiters[0] if delimiters else None, self._is_python,
        )  # fmt: skip
        self._name_group: str | None = None  # the group of the markers that is the name of the tool
        self._name, self._arguments = self._paths()
        self._is_list = field.transform_each or self._is_python
        self._calls = [self._call(tool) for tool in tools]
        names = [tool.name for tool in tools][: 1 if self._is_list else None]
        self._opens, self._closes = [self._open(name) for name in names], [self._close(name) for name in names]

    def rules(self, *, parallel: bool, behind_text: bool) -> list[str]:
        """Return the rule `calls`, or the rules `head` and `rest` of a call behind free text."""
        bodies = self._calls
        if self._is_list:
            call = f"({' | '.join(bodies)})"
            more = f'(BLANK? "," BLANK? {call})*' if parallel else ""
            bodies = [f'BLANK? "[" BLANK? {call} {more} BLANK? "]" BLANK?']
        skipped, marker = self.trigger() if behind_text else (0, "")
        regions = zip(self._opens, bodies, self._closes, strict=True)
        call = " | ".join(" ".join([*open[skipped:], body, *close]) for open, body, close in regions)
        if behind_text:
            text = "head: TEXT?" if marker.startswith("<[") else "head[lazy]: TEXT"
            return [*self._lark, f"{text} {marker}", f"rest: {call}"]
        return [*self._lark, f"call: {call}", f"calls: call{'+' if parallel and self._field.repeats else ''}"]

    def trigger(self) -> tuple[int, str]:
        """Return up to which part an opening begins a call in any text, and the last of these parts.

        Raises ValueError if a call begins with a pattern, or with a word that other text may have, too.
        """
        first = self._opens[0]
        end = 1 + next((n for n, part in enumerate(first) if not part.endswith((")?", "{0,1}", "{0,}"))), len(first))
        marker = first[end - 1] if end <= len(first) else ""
        is_marker = marker.startswith("<[") or (marker.startswith('"') and re.search(r"[^\w\s]", marker[1:-1]))
        if not is_marker or any(parts[:end] != first[:end] for parts in self._opens):
            raise ValueError("its calls begin with no fixed marker")
        return end, marker

    def _ends(self) -> list[str]:
        """Return the regexes of what ends a call."""
        field = self._field
        if field.close_literals is not None:
            return [regex_of(re.escape(text)) for text in field.close_literals]
        return [] if field.close_re is None else [regex_of(field.close_re.pattern)]

    def _open(self, name: str) -> list[str]:
        return self._marker(self._field.open_literals, self._field.open_re, name)

    def _close(self, name: str) -> list[str]:
        return self._marker(self._field.close_literals, self._field.close_re, name)

    def _marker(self, texts: list[str] | None, pattern: Any, name: str) -> list[str]:
        """Return the parts of a marker; `name` is the text of the group that captures the tool's name."""
        if texts is None:
            groups = {} if self._name_group is None else {self._name_group: name}
            return self._markers.pattern(pattern.pattern, groups) if pattern is not None else []
        if len(texts) == 1:
            return self._markers.text(texts[0])
        return [f"({' | '.join(' '.join(self._markers.text(text)) for text in texts)})"]

    def _paths(self) -> tuple[Path | None, Path]:
        """Return where the content has the name and the arguments; None for a name that a marker captures."""
        transform = self._field.transform
        function = transform.get("function", transform) if isinstance(transform, dict) else transform
        if isinstance(function, dict):
            name, arguments = (self._path(function.get(key)) for key in ("name", "arguments"))
            if arguments is None or (name is None and self._name_group is None):
                raise ValueError("its transform has no arguments of the content")
            return name, arguments
        base = () if function is None else self._path(function)
        if base is None:
            raise ValueError("its transform has no function of the content")
        return (*base, "name"), (*base, "arguments")

    def _path(self, placeholder: Any) -> Path | None:
        match = PLACEHOLDER.fullmatch(placeholder) if isinstance(placeholder, str) else None
        if match is None:
            raise ValueError("its transform has no name and arguments")
        root, *keys = match[1].split(".")
        if any(
            pattern is not None and root in pattern.groupindex
            for pattern in (self._field.open_re, self._field.close_re)
        ):
            self._name_group = root
            return None
        return tuple(keys) if root == "content" and not self._field.transform_each else (root, *keys)

    def _call(self, tool: ToolSchema) -> str:
        """Return the expression of a call between its markers."""
        self._values.begin_tool({key: tool.schema[key] for key in ("$defs", "definitions") if key in tool.schema})
        if self._field.content == "json":
            named = [] if self._name is None else [(self._name, {"const": tool.name})]
            value = self._values.value(_nested([*named, (self._arguments, tool.schema)]))
            return value if self._is_list else f"BLANK? {value} BLANK?"
        if self._is_python:
            return self._python_call(tool)
        if self._field.content not in ("xml-inline", "kv-lines"):
            raise ValueError(f"its calls have the content {self._field.content!r}")
        if self._name is not None or self._arguments:
            raise ValueError("its markers do not have the name of the tool")
        if self._field.content == "xml-inline":
            tags = (f"(BLANK? {tag})" + ("" if is_required else "?") for tag, is_required in self._tags(tool))
            return " ".join([*tags, "BLANK?"])
        return " ".join(line if is_required else f"({line})?" for line, is_required in self._lines(tool))

    def _python_call(self, tool: ToolSchema) -> str:
        members: list[Member] = []
        for name, schema, is_required in parameters_of(tool.schema):
            if not PYTHON_NAME.fullmatch(name):
                raise ValueError(f"the parameter {name!r:.64} is no name of a keyword argument")
            members.append((f'{literal(name)} BLANK? "=" BLANK? {self._values.value(schema)}', is_required))
        if not PYTHON_NAME.fullmatch(tool.name):
            raise ValueError("its name is no name of a function")
        if _is_free(tool):
            members.append((f'{FREE_NAME} "=" {self._values.value({"type": "string"})}', False))
        return f"{literal(tool.name)} {self._values.members('(', members, ')')}"

    def _tags(self, tool: ToolSchema) -> Iterator[Member]:
        pattern = self._args.get("tag_pattern", "")
        for name, schema, is_required in parameters_of(tool.schema):
            self._values.check_text(name)
            parts = self._markers.pattern(pattern, {"key": name}, {"value": VALUE})
            yield self._values.rule(self._tag(parts, schema)), is_required
        if _is_free(tool):
            parts = self._markers.pattern(pattern, {}, {"key": FREE_NAME, "value": VALUE})
            yield f"({self._values.rule(self._tag(parts, True))})*", False

    def _tag(self, parts: list[str], schema: Any) -> str:
        """Return the expression of a tag; a text ends where the closing tag begins."""
        if VALUE not in parts or len(parts) < parts.index(VALUE) + 2:
            raise ValueError("its tags have no value between two markers")
        before, after = parts[: parts.index(VALUE)], parts[parts.index(VALUE) + 1 :]
        if not self._has_json and (text := text_regex(schema)) is not None:
            close, *rest = after[1:] if after[0].startswith("(/") else after
            return " ".join([*before, self._values.text_before(close, text), *rest])
        return " ".join([*before, self._value(schema), *after])

    def _lines(self, tool: ToolSchema) -> Iterator[Member]:
        end, separator = self._args.get("line_sep", "\n"), self._args.get("kv_sep", ":")
        for name, schema, is_required in parameters_of(tool.schema):
            self._values.check_text(name)
            if separator in name or end in name:
                raise ValueError(f"the parameter {name!r:.64} has a separator of the format in its name")
            if isinstance(schema, dict) and (types_of(schema) & {"object", "array"} or "$ref" in schema):
                raise ValueError(f"the parameter {name!r:.64} may take more than one line")
            if not self._has_json and (text := text_regex(schema, r"[^\n]")) is not None:
                value = self._values.text_before(literal(end), text)
            else:
                value = f"{self._value(schema)} {literal(end)}"
            yield f'{literal(name + separator)} " "? {value}', is_required

    @property
    def _has_json(self) -> bool:
        """Whether the values of parameters are JSON; raises ValueError for other parsers of values."""
        parser = self._args.get("value_parser") or {}
        if parser.get("name", "text") not in ("text", "json") or (parser.get("name") == "json" and parser.get("args")):
            raise ValueError(f"its values have the content {parser['name']!r}")
        return parser.get("name") == "json"

    def _value(self, schema: Any) -> str:
        """Return the expression of a value that is JSON, or one of some texts."""
        if not self._has_json:
            if (texts := written_choices(schema)) is not None:
                return f"({' | '.join(literal(self._stripped(text)) for text in texts)})"
            types = types_of(definition_of(schema, self._values.definitions) or schema)
            if not types or not types <= READ_TYPES:
                raise ValueError("it has a parameter whose schema is neither a plain text nor of one type")
        return self._values.value(schema)

    def _stripped(self, text: str) -> str:
        self._values.check_text(text)
        if text.strip() != text or not text:
            raise ValueError(f"the text {text!r:.64} begins or ends with whitespace")
        return text


def _nested(values: Sequence[tuple[Path, Any]]) -> Any:
    """Return the schema of an object that has values at these paths."""
    if len(values) == 1 and not values[0][0]:
        return values[0][1]
    if not all(path for path, _ in values):
        raise ValueError("its transform has the name within the arguments")
    keys = list(dict.fromkeys(path[0] for path, _ in values))
    properties = {key: _nested([(path[1:], value) for path, value in values if path[0] == key]) for key in keys}
    return {"type": "object", "properties": properties, "required": keys, "additionalProperties": False}


def _is_free(tool: ToolSchema) -> bool:
    """Return whether a tool takes parameters of any name."""
    return "properties" not in tool.schema and tool.schema.get("additionalProperties", True) is True
