"""The formats in which models reason and call tools, and how they are found from a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..chat_template import Message
from .call_readers import CallReader, JsonCallReader, MistralReader, XmlCallReader
from .described_formats import DESCRIPTIONS, described_format
from .harmony_parser import CHANNEL, MARKERS, HarmonyParser
from .output_parser import AnswerParser, OutputParser, ReasoningFormat
from .parser_names import ReasoningParserName, ToolCallParserName
from .template_format import TemplateFormat
from .template_parser import TemplateParser
from .tool_schemas import ToolSchema

TEMPLATE = "response_template"  # name of the format that a checkpoint's tokenizer describes
Thinking = Literal["open", "closed", "unset"]  # what the end of a prompt says about reasoning
Tools = Sequence[ToolSchema]


@dataclass(frozen=True)
class CallFormat:
    """A format of tool calls: the markers that begin a block, and the reader of a block for the tools of a request."""

    name: str
    markers: tuple[str, ...]
    new_reader: Callable[[Tools], CallReader]
    inner: tuple[str, ...] = ()  # markers within a block
    bare: bool = False
    id_length: int = 24  # characters of a call's id


CALL_FORMATS = {
    call_format.name: call_format
    for call_format in (
        CallFormat("hermes", ("<tool_call>",), lambda tools: JsonCallReader("</tool_call>"), ("</tool_call>",)),
        CallFormat(
            "qwen3_coder",
            ("<tool_call>",),
            lambda tools: XmlCallReader({t.name: t.text_parameters for t in tools}),
            ("</tool_call>",),
        ),
        CallFormat("llama3_json", (), lambda tools: JsonCallReader(names={t.name for t in tools}), bare=True),
        CallFormat("mistral", ("[TOOL_CALLS]",), lambda tools: MistralReader(), ("[ARGS]", "[CALL_ID]"), id_length=9),
    )
}
REASONING_FORMATS = {
    "qwen3": ReasoningFormat("<think>", "</think>"),
    "deepseek_r1": ReasoningFormat("<think>", "</think>", always=True),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
}


@dataclass(frozen=True)
class ChatFormat:
    """The form in which a model writes reasoning and calls.

    template      the checkpoint's description of both
    harmony       messages with channels, for reasoning and calls
    mistral_args  calls are `[TOOL_CALLS]NAME[ARGS]{...}`, not a JSON list
    special       the ids of those markers that are special tokens
    """

    reasoning: ReasoningFormat | None = None
    calls: CallFormat | None = None
    template: TemplateFormat | None = None
    harmony: bool = False
    mistral_args: bool = False
    special: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_tools(self) -> bool:
        """True if tool calls can be parsed."""
        return self.calls is not None or self.harmony or self.template is not None

    @property
    def has_reasoning(self) -> bool:
        return self.reasoning is not None or self.harmony or self.template is not None

    @property
    def id_length(self) -> int:
        return self.calls.id_length if self.calls else 24

    def markers(self) -> tuple[str, ...]:
        """Return the markers of reasoning and calls."""
        if self.harmony:
            return MARKERS
        reasoning = (self.reasoning.open, self.reasoning.close) if self.reasoning else ()
        return (*reasoning, *(self.calls.markers if self.calls else ()), *(self.calls.inner if self.calls else ()))

    def needs_special_tokens(self, tools: Tools) -> bool:
        """Return whether the text of an answer must keep special tokens, because markers are such tokens."""
        if self.template is not None or self.harmony:
            return True
        of_calls = {*self.calls.markers, *self.calls.inner} if self.calls and tools else set()
        of_reasoning = {self.reasoning.open, self.reasoning.close} if self.reasoning else set()
        return not (of_calls | of_reasoning).isdisjoint(self.special)

    def message(self, message: Message) -> Message:
        """Return a message as the chat template takes it.

        gpt-oss's has another name for reasoning, and takes it beside calls only if there is no content.
        """
        if not self.harmony or "reasoning_content" not in message:
            return message
        renamed = {name: value for name, value in message.items() if name != "reasoning_content"}
        keeps = not (message.get("tool_calls") and message["content"])
        return renamed | ({"thinking": message["reasoning_content"]} if keeps else {})

    def thinking(self, prompt_end: str) -> Thinking:
        """Return whether a prompt with this end opens reasoning, has closed it, or leaves it to the model."""
        if self.harmony:
            parser = HarmonyParser(prompt_end, returns_calls=True)
            return "open" if parser.in_reasoning else "closed" if parser.in_message else "unset"
        if self.reasoning is None:
            answer = self.parser((), prompt_end)
            return "open" if answer is not None and answer.in_reasoning else "closed"
        end = prompt_end.rstrip()
        if end.endswith(self.reasoning.open):
            return "open"
        if end.endswith(self.reasoning.close):
            return "closed"
        return "open" if self.reasoning.always else "unset"

    def parser(self, tools: Tools, prompt_end: str, *, in_reasoning: bool = False) -> AnswerParser | None:
        """Return the parser of an answer behind this prompt; None if its text is content as it is.

        in_reasoning  the prompt ends within reasoning, although not with its marker
        """
        if self.template is not None:
            template = self.template.compiled if tools else self.template.without_calls
            return TemplateParser(template, prompt_end, [tool.for_parser() for tool in tools])
        if self.harmony:
            return HarmonyParser(prompt_end, returns_calls=bool(tools))
        calls = self.calls if tools else None
        if self.reasoning is None and calls is None:
            return None
        return OutputParser(
            self.reasoning,
            calls.markers if calls else (),
            lambda: (calls or CALL_FORMATS["hermes"]).new_reader(tools),
            bare_calls=calls is not None and calls.bare,
            in_reasoning=in_reasoning or self.thinking(prompt_end) == "open",
        )


def find_format(
    tool_parser: ToolCallParserName,
    reasoning_parser: ReasoningParserName,
    template: str,
    response_template: dict[str, Any] | None,
    special_tokens: Mapping[str, int],
) -> ChatFormat:
    """Return the format for the names of two parsers; "auto" finds them in the chat template.

    Raises ValueError for names that exclude each other, and for a response_template that is missing or cannot be used.
    """
    of_both = _format_of_both(tool_parser, reasoning_parser, template, is_described=response_template is not None)
    if of_both == "harmony":
        return ChatFormat(harmony=True, special=_ids_of(MARKERS, special_tokens))
    if of_both == TEMPLATE:
        assert response_template is not None
        try:
            return _described(response_template, special_tokens)
        except ValueError as error:
            way_out = "set tool_call_parser to another format, or to 'none'"
            raise ValueError(f"the tokenizer's response_template cannot be used: {error}; {way_out}") from error
    if of_both is not None:
        return _described(DESCRIPTIONS[of_both], special_tokens)
    reasoning = _reasoning_in(template) if reasoning_parser == "auto" else reasoning_parser
    calls = _calls_in(template) if tool_parser == "auto" else tool_parser
    has_args = calls == "mistral" and "[ARGS]" in template
    chat_format = ChatFormat(REASONING_FORMATS.get(reasoning), CALL_FORMATS.get(calls), mistral_args=has_args)
    return replace(chat_format, special=_ids_of(chat_format.markers(), special_tokens))


def _format_of_both(
    tool_parser: ToolCallParserName, reasoning_parser: ReasoningParserName, template: str, *, is_described: bool
) -> str | None:
    """Return the name of a format of reasoning and calls: harmony, a described one, or the tokenizer's description."""
    choices: set[str] = {tool_parser, reasoning_parser}
    if TEMPLATE in choices and not is_described:
        option = "tool_call_parser" if tool_parser == TEMPLATE else "reasoning_parser"
        raise ValueError(f"{option}={TEMPLATE!r}: this model's tokenizer has no response_template; use another parser")
    of_both = min(choices & {TEMPLATE, "harmony", *DESCRIPTIONS}, default=None)
    if of_both is None:
        if choices == {"auto"} and is_described:
            return TEMPLATE
        if "auto" not in choices or not choices <= {"auto", "none"}:
            return None
        return "harmony" if CHANNEL + "analysis" in template else described_format(template)
    if not choices <= {"auto", of_both}:
        raise ValueError(
            f"tool_call_parser={tool_parser!r} and reasoning_parser={reasoning_parser!r} exclude each other: {of_both}"
            f" is a format of reasoning and calls; set both to {of_both!r} or 'auto'"
        )
    return of_both


def _ids_of(texts: Iterable[str], special_tokens: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of those texts that are special tokens."""
    return {text: special_tokens[text] for text in texts if text in special_tokens}


def _described(description: dict[str, Any], special_tokens: Mapping[str, int]) -> ChatFormat:
    template_format = TemplateFormat(description, special_tokens)
    return ChatFormat(template_format.reasoning, template=template_format, special=special_tokens)


def _reasoning_in(template: str) -> str:
    """Return the name of the reasoning that a chat template shows."""
    if "[THINK]" in template:
        return "mistral"
    return "qwen3" if "</think>" in template or "<think>" in template else "none"


def _calls_in(template: str) -> str:
    """Return the name of the format of calls that a chat template shows."""
    if described_format(template) is not None:  # as a format of calls and reasoning only
        return "none"
    if "<tool_call>" in template:
        return "qwen3_coder" if "<function=" in template else "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    is_llama = '"parameters": ' in template and "ipython" in template
    return "llama3_json" if is_llama else "none"
