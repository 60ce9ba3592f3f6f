"""A format of reasoning and calls that a checkpoint describes in its `response_template`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .marker_grammar import MarkerGrammar
from .output_parser import ReasoningFormat
from .template_grammar import TemplateCalls
from .tool_schemas import ToolSchema

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TemplateFormat:
    """A tokenizer's response_template, compiled; raises ValueError if transformers cannot read it.

    special         the ids of special tokens
    without_calls   the same template for requests without tools: it leaves calls in the content
    reasoning       the markers of reasoning, if each is one text
    cannot_require  why no grammar can make the model write a call; None if one can
    cannot_begin    why no grammar can constrain a call that the model begins in its text
    """

    def __init__(self, template: dict[str, Any], special: Mapping[str, int]) -> None:
        from transformers.utils.chat_parsing.response_templates import load_response_template  # takes 0.3 s

        self.compiled = load_response_template(template)
        fields = {
            name: field for name, field in self.compiled.fields.items() if name != "tool_calls" or field.open_re is None
        }
        self.without_calls = replace(self.compiled, fields=fields)
        self.markers = MarkerGrammar(special)
        self.reasoning = self._reasoning()
        self.cannot_require = self._problem(behind_text=False)
        self.cannot_begin = self.cannot_require or self._problem(behind_text=True)

    def calls(self, tools: Sequence[ToolSchema]) -> TemplateCalls:
        """Return the rules of the calls of some tools; raises ValueError for what cannot be expressed."""
        return TemplateCalls(self.compiled.fields.get("tool_calls"), self.markers, tools)

    def _reasoning(self) -> ReasoningFormat | None:
        for field in (self.compiled.fields.get(name) for name in REASONING_FIELDS):
            if field and len(field.open_literals or ()) == 1 and len(field.close_literals or ()) == 1:
                return ReasoningFormat(field.open_literals[0], field.close_literals[0])
        return None

    def _problem(self, *, behind_text: bool) -> str | None:
        parameters = {"text": {"type": "string"}, "number": {"type": "integer"}}
        tool = ToolSchema("f", parameters={"type": "object", "properties": parameters, "required": ["text"]})
        try:
            self.calls([tool]).rules(parallel=False, behind_text=behind_text)
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # transformers checks few of its values
            return str(error)
        return None
