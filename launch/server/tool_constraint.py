"""The constraint that a chat's tools make on its answers, checked by the compiler of grammars."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from ...runtime.chat.chat_formats import ChatFormat, Thinking
from ...runtime.chat.tool_grammar import ToolGrammar, ToolRules
from ...runtime.chat.tool_schemas import ToolSchema
from ...runtime.request import RequestRefused
from ...runtime.structured_outputs import StructuredOutputsParams
from ..engine.grammar_check import GrammarsWaiting
from .api_errors import ApiError

log = logging.getLogger(__name__)
RELAX_S = 5.0  # longest time to find out which of a request's tools make the grammar fail
QUOTED_POSITION, QUOTED_GRAMMAR = re.compile(r"^(at )?\d+\(\d+\): "), re.compile(r" (?:\(at \"|\d+ \| )")
CheckGrammar = Callable[[StructuredOutputsParams], Awaitable[None]]


@dataclass(frozen=True)
class ToolConstraint:
    """Builds the constraint of one request; `answer` is that of the text of an answer without calls.

    If a schema makes no grammar, its tool takes any JSON object, unless it is strict or a call is required.
    """

    check_grammar: CheckGrammar
    format: ChatFormat
    thinking: Thinking
    answer: StructuredOutputsParams | None

    async def build(self, rules: ToolRules) -> StructuredOutputsParams | None:
        """Return the constraint; raises ApiError naming a tool that cannot be constrained although it must be."""
        grammar = await self._grammar(rules)
        if not isinstance(grammar, Exception):
            return grammar
        must_follow = rules.required or any(tool.strict for tool in rules.tools)
        usable = await self._usable_tools(rules)
        if usable is not None:
            grammar = await self._grammar(replace(rules, tools=usable))
        if isinstance(grammar, Exception) and not must_follow:  # there are too many of them
            log.warning("all %d tools take any JSON object: no grammar for them: %.200s", len(rules.tools), grammar)
            grammar = await self._grammar(replace(rules, tools=[_relaxed(tool) for tool in rules.tools]))
        if isinstance(grammar, Exception):
            raise _not_constrained("all tools together", grammar) from grammar
        return grammar

    async def _grammar(self, rules: ToolRules) -> StructuredOutputsParams | Exception | None:
        """Return the grammar of these tools, or the reason why there is none; raises GrammarsWaiting."""
        try:
            grammar = ToolGrammar(self.format, rules).build(self.thinking, self.answer)
            if grammar is not None:
                await self.check_grammar(grammar)
        except GrammarsWaiting:  # the server is busy
            raise
        except (ValueError, RequestRefused) as error:
            return error
        return grammar

    async def _usable_tools(self, rules: ToolRules) -> Sequence[ToolSchema] | None:
        """Return the tools, those with schemas that cannot be used relaxed; None if that takes too long."""
        usable, started = [], time.monotonic()
        for tool in rules.tools:
            usable.append(await self._usable(tool, must_follow=rules.required or tool.strict))
            if time.monotonic() - started > RELAX_S:
                return None
        return usable

    async def _usable(self, tool: ToolSchema, *, must_follow: bool) -> ToolSchema:
        """Return the tool, or the tool with any object as its arguments if its schema cannot be used."""
        alone = replace(self, thinking="closed", answer=None)
        reason = await alone._grammar(ToolRules([tool]))
        if not isinstance(reason, Exception):
            return tool
        if must_follow:
            raise _not_constrained(f"the tool {tool.name!r}", reason) from reason
        log.warning("the tool %.64r takes any JSON object: no grammar for its schema: %.200s", tool.name, reason)
        return _relaxed(tool)


def _relaxed(tool: ToolSchema) -> ToolSchema:
    return replace(tool, parameters={"type": "object"})


def _not_constrained(subject: str, error: Exception) -> ApiError:
    """Return the response to tools whose schemas make no grammar; the compiler's message quotes lines of it."""
    reason = str(error).removeprefix("structured_outputs=llguidance cannot be used: ")
    reason = QUOTED_GRAMMAR.split(QUOTED_POSITION.sub("", reason))[0]
    return ApiError(
        400, f"Invalid 'tools': {subject} cannot be constrained: {reason}", param="tools", code="invalid_value"
    )
