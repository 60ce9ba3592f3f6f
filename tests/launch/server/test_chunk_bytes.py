"""The bytes of streamed chunks: equal to the JSON of pydantic's models, for chunks of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lockstep.launch.server.api_errors import ApiError
from lockstep.launch.server.chat_preparation import PreparedChat
from lockstep.launch.server.protocol import reply_models as api
from lockstep.launch.server.reply_builders import ChatBuilder, CompletionBuilder, ReplyBuilder, ReplyOptions
from lockstep.launch.server.token_usage import TokenUsage
from lockstep.runtime.chat.chat_formats import find_format
from lockstep.runtime.chat.tool_schemas import ToolSchema
from lockstep.runtime.detokenizer import PromptText
from lockstep.runtime.outputs import Event, Logprob

from scripted_answers import ANSWER, CALLS

ODD = '"\\/\b\f\n\r\t\x00\x1f\x7f\u2028\u00e9\U0001f600\ufffd[]null"choices":[]'
NAME = 'models/"choices":[],"usage":null,[]'
OPTIONS = {
    "plain": ReplyOptions(),
    "ids": ReplyOptions(token_ids=True),
    "logprobs": ReplyOptions(num_top=2),
    "all": ReplyOptions(num_top=2, token_ids=True, tokens_as_ids=True),
}
QWEN = find_format("hermes", "qwen3", "", None, {})
PLAIN_CHAT = PreparedChat([], lambda: None, None, False, 24, "an echo")


def events_of(texts: list[str], *, has_logprobs: bool, reason: str, stop: Any) -> list[tuple[int, Event]]:
    """Two outputs in turn, with a token for each text."""
    made = []
    for position, text in enumerate(texts):
        is_last = position == len(texts) - 1
        candidates = {token: Logprob(-0.1 * token, token, text or "x", b"x") for token in (1, 2, 3)}
        for index in (0, 1):
            event = Event(
                index, text, [1], [candidates] if has_logprobs else None, cast(Any, reason) if is_last else None,
                stop if is_last else None, [5, 6], 1, text_offsets=[position] if has_logprobs else None,
            )  # fmt: skip
            made.append((index, event))
    return made


def streamed(builder: ReplyBuilder, events: list[tuple[int, Event]], usage: TokenUsage, mode: str) -> list[bytes]:
    async def source() -> AsyncIterator[tuple[int, Event]]:
        for index, event in events:
            usage.update(0, event)
            yield index, event

    async def collect() -> list[bytes]:
        return [chunk async for chunk in builder.stream(source())]

    builder._options = replace(builder._options, usage=mode != "none", usage_in_every_chunk=mode == "every")
    return asyncio.run(collect())


def check(builder: ReplyBuilder, events: list[tuple[int, Event]], usage: TokenUsage, mode: str) -> list[Any]:
    """Check the bytes of all chunks, and return their models."""
    models = []
    for chunk in streamed(builder, events, usage, mode):
        model: Any = builder.chunk_type.model_validate_json(chunk)
        assert chunk == model.model_dump_json().encode(), "another order, form or set of fields"
        assert (model.id, model.created, model.model) == (builder._id, builder._created, NAME)
        models.append(model)
    assert [m.usage is not None for m in models[:-1]] == [mode == "every"] * (len(models) - 1)
    assert (models[-1].usage == usage.usage()) == (mode != "none")
    assert (models[-1].choices == []) == (mode != "none")
    return [choice for model in models for choice in model.choices]


ends = st.sampled_from([("length", None), ("stop", None), ("stop", 7), ("stop", '"é"')])
modes = st.sampled_from(["none", "last", "every"])
texts = st.lists(st.sampled_from(["", ODD, " a"]) | st.text(max_size=5), min_size=1, max_size=5)
kinds = pytest.mark.parametrize("kind", list(OPTIONS))


@kinds
@given(texts=texts, end=ends, mode=modes, echo=st.booleans())
@settings(max_examples=30)
def test_completions(kind: str, texts: list[str], end: tuple[str, Any], mode: str, echo: bool) -> None:
    options, usage = OPTIONS[kind], TokenUsage(2)
    events = events_of(texts, has_logprobs=options.num_top is not None, reason=end[0], stop=end[1])
    echoes = [PromptText(ODD, [b"a", b"b"], [0, 1])] if echo and options.num_top is None else []
    choices = check(CompletionBuilder(NAME, options, usage, 2, echoes), events, usage, mode)
    for index in (0, 1):
        mine = [choice for choice in choices if choice.index == index]
        assert "".join(c.text for c in mine) == (ODD if echoes else "") + "".join(texts)
        assert [(c.finish_reason, c.stop_reason) for c in mine if c.finish_reason] == [end]
        if options.token_ids:
            assert [token for c in mine for token in c.token_ids] == [1] * len(texts)
            assert [c.prompt_token_ids for c in mine] == [[5, 6]] + [None] * (len(mine) - 1)


@kinds
@given(texts=texts, end=ends, mode=modes)
@settings(max_examples=30)
def test_chats(kind: str, texts: list[str], end: tuple[str, Any], mode: str) -> None:
    options, usage = OPTIONS[kind], TokenUsage(2)
    events = events_of(texts, has_logprobs=options.num_top is not None, reason=end[0], stop=end[1])
    choices = check(ChatBuilder(NAME, options, usage, PLAIN_CHAT), events, usage, mode)
    for index in (0, 1):
        mine = [choice for choice in choices if choice.index == index]
        assert mine[0].delta == {"role": "assistant", "content": ""}
        assert "".join(c.delta.get("content", "") for c in mine) == "an echo" + "".join(texts)
        assert [(c.finish_reason, c.stop_reason) for c in mine if c.finish_reason] == [end]


@kinds
@pytest.mark.parametrize("mode", ["none", "every"])
def test_reasoning_and_calls(kind: str, mode: str) -> None:
    usage, tools = TokenUsage(2), [ToolSchema(name) for name, _ in CALLS]
    chat = PreparedChat([], lambda: QWEN.parser(tools, ""), None, False, 24, "")
    texts = [ANSWER[i : i + 3] for i in range(0, len(ANSWER), 3)]
    options = OPTIONS[kind]
    events = events_of(texts, has_logprobs=options.num_top is not None, reason="stop", stop=None)
    choices = check(ChatBuilder(NAME, options, usage, chat), events, usage, mode)
    deltas = [choice.delta for choice in choices if choice.index == 1]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Where?"
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    assert sum("tool_calls" in delta for delta in deltas) > 4
    assert choices[-1].finish_reason == "tool_calls"


def test_failures_and_token_counts() -> None:
    error, usage = ApiError(503, ODD, code="aborted"), TokenUsage(3, 4, 5, {0: 6, 1: 7})
    builder = CompletionBuilder(NAME, ReplyOptions(), usage, 1, [])
    assert builder.failure(error) == [error.reply().model_dump_json().encode()]
    assert usage.json() == usage.usage().model_dump_json().encode()


def test_plain_chunk_is_that_of_models_made_from_its_event() -> None:
    usage = TokenUsage(2)
    builder = CompletionBuilder(NAME, ReplyOptions(), usage, 1, [])
    ((_, event), *_) = events_of([ODD, ""], has_logprobs=False, reason="stop", stop=None)
    choice = api.CompletionChunkChoice(index=0, text=ODD, logprobs=None, finish_reason=None, stop_reason=None)
    fields: dict[str, Any] = {"id": builder._id, "created": builder._created, "model": NAME, "usage": None}
    expected: BaseModel = api.CompletionChunk(choices=[choice], **fields)
    assert streamed(builder, [(0, event)], usage, "none") == [expected.model_dump_json().encode()]
