"""Which tools are relaxed and which are refused when there is no grammar for their schemas."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lockstep.launch.engine.grammar_check import GrammarsWaiting
from lockstep.launch.server.api_errors import ApiError
from lockstep.launch.server.tool_constraint import ToolConstraint
from lockstep.runtime.chat.chat_formats import CALL_FORMATS, ChatFormat
from lockstep.runtime.chat.tool_grammar import ToolRules
from lockstep.runtime.chat.tool_schemas import ToolSchema
from lockstep.runtime.structured_outputs import StructuredOutputsParams

FREE = '"type\\": \\"object\\", \\"x-guidance'  # a schema without properties


def text(name: str, **changes: Any) -> ToolSchema:
    return ToolSchema(name, parameters={"type": "object", "properties": {f"of_{name}": {"type": "string"}}}, **changes)


def build(tools: list[ToolSchema], *wrong: str, required: bool = False) -> str:
    """Return the grammar of these tools with a compiler that refuses the texts `wrong`."""

    async def check(params: StructuredOutputsParams) -> None:
        for part in wrong:
            if part in params.text:
                raise ValueError(f'structured_outputs=llguidance cannot be used: at 3(1): {part} is wrong (at "x')

    constraint = ToolConstraint(check, ChatFormat(None, CALL_FORMATS["hermes"]), "closed", None)
    grammar = asyncio.run(constraint.build(ToolRules(tools, required)))
    assert grammar is not None
    return grammar.text


def test_a_tool_without_a_grammar_takes_any_object_alone() -> None:
    grammar = build([text("a"), text("b")], "of_b")
    assert "of_a" in grammar
    assert "of_b" not in grammar
    assert grammar.count(FREE) == 1


@pytest.mark.parametrize(("strict", "required"), [(True, False), (False, True)])
def test_a_tool_that_must_be_followed_is_refused_by_name(strict: bool, required: bool) -> None:
    with pytest.raises(ApiError, match=r"the tool 'b' cannot be constrained: of_b is wrong$"):
        build([text("a"), text("b", strict=strict)], "of_b", required=required)


def test_tools_that_are_too_much_together_take_any_object() -> None:
    properties = {f"parameter_{n}": {"type": "string"} for n in range(60)}
    tools = [ToolSchema(f"f{n}", parameters={"type": "object", "properties": properties}) for n in range(60)]
    grammar = build(tools)
    assert "parameter_0" not in grammar
    assert grammar.count(FREE) == len(tools)
    for changed in ({"required": True}, {"tools": [*tools, text("g", strict=True)]}):
        with pytest.raises(ApiError, match="all tools together cannot be constrained: structured_outputs=has 1"):
            build(**{"tools": tools} | changed)  # type: ignore[arg-type]


def test_a_busy_compiler_is_no_reason_to_relax() -> None:
    async def check(params: StructuredOutputsParams) -> None:
        raise GrammarsWaiting("later")

    constraint = ToolConstraint(check, ChatFormat(None, CALL_FORMATS["hermes"]), "closed", None)
    with pytest.raises(GrammarsWaiting):
        asyncio.run(constraint.build(ToolRules([text("a")])))
