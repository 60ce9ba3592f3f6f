"""Grammars in llguidance's Lark that make an answer follow a chat format: reasoning, then calls, text or an answer.

Calls are always constrained to the tools and their schemas. With the tool choice "auto", text is free up to the marker
of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..sampling.grammar import WHITESPACE, to_llguidance
from ..structured_outputs import StructuredOutputsParams
from .chat_formats import ChatFormat, Thinking
from .harmony_parser import CHANNEL, CONSTRAIN, END, MESSAGE, START
from .marker_grammar import MarkerGrammar, literal
from .output_parser import ReasoningFormat
from .tool_schemas import ToolSchema, is_text, parameters_of, text_choices, with_definitions

NEWLINE = "\n"  # f-strings of Python 3.10 take no backslash
LARK_HEAD = "%llguidance {}\nTEXT: /(.|\\n)*/\n"


@dataclass(frozen=True)
class ToolRules:
    """The parts that an answer may contain.

    required  at least one call, and no text beside calls
    parallel  more than one call
    """

    tools: Sequence[ToolSchema] = ()
    required: bool = False
    parallel: bool = True


@dataclass
class ToolGrammar:
    """Builds the grammar of one request, rule by rule."""

    format: ChatFormat
    rules: ToolRules
    _lark: list[str] = field(default_factory=list)
    _is_free: bool = False  # calls may come anywhere in a text

    def build(self, thinking: Thinking, answer: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """Return the grammar; None if everything is allowed. `answer` constrains the text of an answer without calls.

        Raises ValueError naming the tool whose schema this format of calls cannot express.
        """
        if not self.rules.tools and (answer is None or thinking == "closed"):
            return answer
        if self.format.harmony:
            self._harmony(thinking, has_answer=answer is not None)
        else:
            self._start(thinking, has_answer=answer is not None)
            if self.rules.tools:
                self._add_calls()
        grammars: list[dict[str, Any]] = [{"lark_grammar": LARK_HEAD + "\n".join(self._lark)}]
        if answer is not None and not self.rules.required:
            text = to_llguidance(answer.kind, answer.text, answer.disable_any_whitespace)
            grammar = json.loads(text)["grammars"][0] if text.startswith("{") else {"lark_grammar": text}
            grammars.append(grammar | {"name": "answer"})
        return StructuredOutputsParams(llguidance=json.dumps({"grammars": grammars}, ensure_ascii=False))

    def _start(self, thinking: Thinking, *, has_answer: bool) -> None:
        """Add the rule of the whole output and that of reasoning."""
        rules, reasoning = self.rules, self.format.reasoning
        if rules.required:
            body = "calls"
        elif has_answer:
            body = "calls | @answer" if rules.tools else "@answer"
        elif self.format.calls is not None and self.format.calls.bare:
            body = "calls | PLAIN"
            self._lark.append(r"PLAIN: /(\s*[^{\s](.|\n)*)?/")
        else:
            self._is_free = True
            self._start_free(reasoning, thinking)
            return
        if thinking == "open" and reasoning is None:
            raise ValueError("the prompt begins reasoning whose markers are patterns, which end it nowhere certain")
        if reasoning is None or thinking == "closed":
            self._lark.append(f"start: {body}")
            return
        thought = "thought" if thinking == "open" else f"({self._marker(reasoning.open)} thought)?"
        self._lark.append(f"start: {thought} BLANKS? body\nbody: {body}")
        self._lark.append(r"BLANKS: /\n{1,2}/")
        self._lark.append(self._until("thought", reasoning.close))

    def _start_free(self, reasoning: ReasoningFormat | None, thinking: Thinking) -> None:
        """Add the rule of an output of free text, reasoning included, up to the marker of a call."""
        markers = [self._marker(text) for text in (reasoning.open, reasoning.close)] if reasoning else []
        begin = free = end = ""
        if self.format.template is not None:  # transformers looks for no call inside of reasoning
            if reasoning and thinking == "open":
                begin = "thought "
                self._lark.append(self._until("thought", reasoning.close))
            if markers and all(marker.startswith("<[") for marker in markers):
                free = f"(TEXT? {markers[0]} TEXT? {markers[1]})* "
                end = f"(TEXT? {markers[0]})? "  # reasoning that the end of the answer cuts off
        elif special := " | ".join(marker for marker in markers if marker.startswith("<[")):
            free = f"(TEXT ({special}))* "  # TEXT has no special tokens
        call = f"{free}head rest"
        calls = f"({call})* {free}{end}TEXT?" if self.rules.parallel else f"({call} | {free}{end}TEXT?)"
        self._lark.append(f"start: {begin}{calls}")

    def _add_calls(self) -> None:
        if self.format.template is not None:
            described = self.format.template.calls(self.rules.tools)
            self._lark += described.rules(parallel=self.rules.parallel, behind_text=self._is_free)
            return
        call_format = self.format.calls
        assert call_format is not None
        match call_format.name:
            case "hermes":
                self._blocks(
                    "<tool_call>", "\n", [self._json_call(i, "arguments") for i in self._numbers], "\n", "</tool_call>"
                )
            case "qwen3_coder":
                self._blocks("<tool_call>", "\n", [self._xml_call(i) for i in self._numbers], "\n", "</tool_call>")
            case "llama3_json":
                calls = " | ".join(self._json_call(i, "parameters") for i in self._numbers)
                more = self._more('"; " call')
                self._lark.append(f"call: {calls}\ncalls: call {more}")
            case _:
                self._mistral()

    def _more(self, call: str) -> str:
        """Return further calls, if there may be some."""
        return f"({call})*" if self.rules.parallel else ""

    @property
    def _numbers(self) -> range:
        return range(len(self.rules.tools))

    def _blocks(self, open: str, before: str, calls: Sequence[str], after: str, close: str) -> None:
        """Add blocks of one call each."""
        self._lark.append(f"rest: {literal(before)} ({' | '.join(calls)}) {literal(after)} {self._marker(close)}")
        self._lark.append(self._until("head", open))
        more = self._more(f'"\\n" {self._marker(open)} rest')
        self._lark.append(f"calls: {self._marker(open)} rest {more}")

    def _mistral(self) -> None:
        marker = self._marker("[TOOL_CALLS]")
        if self.format.mistral_args:
            calls = [
                f"{literal(tool.name)} {self._marker('[ARGS]')} {self._json(f'args_{i}', tool.schema)}"
                for i, tool in enumerate(self.rules.tools)
            ]
            self._lark.append(f"rest: {' | '.join(calls)}\ncalls: {marker} rest {self._more(f'{marker} rest')}")
        else:
            calls = [self._json_call(i, "arguments") for i in self._numbers]
            more = self._more('", " call')
            self._lark.append(f'call: {" | ".join(calls)}\nrest: " "? "[" call {more} "]"\ncalls: {marker} rest')
        self._lark.append(self._until("head", "[TOOL_CALLS]"))

    def _harmony(self, thinking: Thinking, *, has_answer: bool) -> None:
        """Add the messages of harmony: reasoning, text beside calls, then one call or the answer."""
        rules = self.rules
        channel, message, constrain, start = map(self._marker, (CHANNEL, MESSAGE, CONSTRAIN, START))
        text, aside = (
            "@answer" if has_answer else "TEXT",
            '"analysis"' if rules.required else '("analysis" | "commentary")',
        )
        last = "call" if rules.required else "call | answer" if rules.tools else "answer"
        whole = f"aside* ({last})"
        continued = f'rest {start} "assistant" {whole}'  # of a message that the prompt ends with
        if thinking == "closed" and not rules.required:
            continued = f"{text} | {continued}"
        self._lark += [
            f"start: {whole if thinking == 'unset' else continued}",
            f'aside: {channel} {aside} {message} rest {start} "assistant"',
            self._until("rest", END),
            f'answer: {channel} "final" (" "? {constrain} "json")? {message} {text}',
        ]
        calls = []
        for number, tool in enumerate(rules.tools):
            recipient = f" to=functions.{tool.name}"
            header = f'({channel} {literal(f"commentary{recipient}")} | {literal(recipient)} {channel} "commentary")'
            arguments = self._json(f"args_{number}", tool.schema)
            calls.append(f'{header} (" "? {constrain} "json" | " json")? {message} {arguments}')
        if calls:
            self._lark.append(f"call: {' | '.join(calls)}")

    def _json_call(self, number: int, key: str) -> str:
        """Return the parts of a call as a JSON object."""
        tool = self.rules.tools[number]
        head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
        return f'{literal(head)} {self._json(f"args_{number}", tool.schema)} "}}"'

    def _xml_call(self, number: int) -> str:
        """Return the parts of a call with one tag for each parameter, in the order of the schema."""
        tool = self.rules.tools[number]
        parts = [literal(f"<function={tool.name}>\n")]
        definitions: dict[str, Any] = {
            name: tool.schema[name] for name in ("$defs", "definitions") if name in tool.schema
        }
        if "properties" not in tool.schema and tool.schema.get("additionalProperties") is not False:
            parts.append(self._free_parameters(number, tool.schema.get("additionalProperties", True), definitions))
        for name, schema, is_required in parameters_of(tool.schema):
            if re.search(r"[>\n]", name):
                raise ValueError(f"it has a parameter {name!r:.64}, which qwen3_coder cannot express")
            value = f"value_{number}_{len(parts)}"
            self._add_xml_value(value, schema, definitions)
            tag = f"({literal(f'<parameter={name}>' + NEWLINE)} {value} {literal(NEWLINE)})"
            parts.append(tag if is_required else f"{tag}?")
        return " ".join([*parts, literal("</function>")])

    def _free_parameters(self, number: int, schema: Any, definitions: dict[str, Any]) -> str:
        """Return parameters of any name, for a schema without properties."""
        value = f"value_{number}"
        self._add_xml_value(value, {"type": "string"} if schema is True else schema, definitions)
        return f'("<parameter=" /[A-Za-z0-9_]{{1,64}}/ ">\\n" {value} "\\n")*'

    def _add_xml_value(self, rule: str, schema: Any, definitions: dict[str, Any]) -> None:
        """Add the rule of a parameter's value with its closing tag."""
        if not is_text(schema):
            value = with_definitions(schema, definitions)
            self._lark.append(
                f"{rule}: {self._json(f'{rule}_json', value, WHITESPACE)} {literal(NEWLINE + '</parameter>')}"
            )
        elif (choices := text_choices(schema)) is not None:
            literals = " | ".join(literal(text) for text in choices)
            self._lark.append(f"{rule}: ({literals}) {literal(NEWLINE + '</parameter>')}")
        else:
            self._lark.append(f"{rule}[lazy]: TEXT {literal('</parameter>')}")

    def _json(self, rule: str, schema: dict[str, Any], whitespace: str = " ?") -> str:
        """Add a rule for JSON that follows a schema, on one line unless `whitespace` allows more; return its name."""
        blanks = {"x-guidance": {"whitespace_pattern": whitespace}}
        self._lark.append(f"{rule}: %json {json.dumps(schema | blanks, ensure_ascii=False)}")
        return rule

    def _marker(self, text: str) -> str:
        """Return a marker as its special tokens, or as the text that it is for other tokenizers."""
        return " ".join(self._markers.text(text))

    @cached_property
    def _markers(self) -> MarkerGrammar:
        return self.format.template.markers if self.format.template else MarkerGrammar(self.format.special)

    def _until(self, rule: str, marker: str) -> str:
        """Return a rule for free text up to the first marker, and the marker."""
        part = self._marker(marker)
        return f"{rule}: TEXT {part}" if part.startswith("<[") else f"{rule}[lazy]: TEXT {part}"
