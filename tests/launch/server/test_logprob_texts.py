"""Texts, places and bytes of tokens in OpenAI's logprobs objects, over tokenizers of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.launch.server.chat_preparation import PreparedChat
from lockstep.launch.server.reply_builders import ChatBuilder, CompletionBuilder, ReplyBuilder, ReplyOptions
from lockstep.launch.server.token_usage import TokenUsage
from lockstep.runtime.detokenizer import Detokenizer, PromptText, TokenBytes, locate_tokens
from lockstep.runtime.generation import Generation, Output, candidates
from lockstep.runtime.outputs import Event
from lockstep.runtime.plan import RequestEnd, TokenLogprobs
from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams

from small_tokenizers import PADDED, SMALL_TOKENIZERS

kinds = pytest.mark.parametrize("kind", SMALL_TOKENIZERS)
IDS = st.lists(st.integers(0, PADDED), max_size=12)
SOME = st.lists(st.integers(0, PADDED), min_size=1, max_size=12)


@cache
def token_bytes(kind: str) -> TokenBytes:
    return TokenBytes(SMALL_TOKENIZERS[kind]())


def of_token(token: int) -> TokenLogprobs:
    """Log-probabilities of a token, and of ids beside it, many of which have the same text or none."""
    likeliest = [(token + distance) % PADDED for distance in (5, 300, 1, 90)]
    return TokenLogprobs(-2.5, 9, likeliest, [-1.0, -1.5, -2.0, -2.25])


def events(kind: str, prompt: list[int], ids: list[int], **options: Any) -> list[Event]:
    """The events of an output with these tokens, the last of which is a stop token, one for each token."""
    params = SamplingParams(logprobs=4, max_tokens=99, **options)
    generation = Generation(0, None, prompt, has_logprobs=True)
    assert generation.prompt_logprobs is not None
    generation.prompt_logprobs[1:] = [candidates(token_bytes(kind), i, of_token(i)) for i in prompt[1:]]
    request = Request(0, np.array(prompt, np.int32), len(prompt), params, [])
    detokenizer = Detokenizer(token_bytes(kind), prompt, skip_special_tokens=params.skip_special_tokens)
    output, made = Output(request, generation, 0, detokenizer), []
    for i, token in enumerate(ids):
        end = RequestEnd(0, "stop", stop_id=token) if i == len(ids) - 1 else None
        output.append(token, of_token(token), end)
        made.append(output.take_event())
        if output.finished:
            break
    return made


CONTENT_ONLY = PreparedChat([], lambda: None, None, False, 24, "")


def completion_builder(echoes: list[PromptText], num_top: int | None) -> CompletionBuilder:
    return CompletionBuilder("m", ReplyOptions(num_top), TokenUsage(0), 1, echoes)


async def in_turn(made: list[Event]) -> AsyncIterator[tuple[int, Event]]:
    for event in made:
        yield 0, event


def whole(builder: ReplyBuilder, made: list[Event]) -> Any:
    response: Any = builder.response_type.model_validate_json(b"".join(asyncio.run(builder.whole(in_turn(made)))))
    return response.choices[0]


def streamed(builder: ReplyBuilder, made: list[Event]) -> list[Any]:
    async def chunks() -> list[Any]:
        return [chunk async for chunk in builder.stream(in_turn(made))]

    models = (builder.chunk_type.model_validate_json(chunk) for chunk in asyncio.run(chunks()))
    return [choice for model in models for choice in cast(Any, model).choices]


def check_completion(choice: Any, num_candidates: int, specials: set[str]) -> None:
    logprobs = choice.logprobs
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for i, (text, offset) in enumerate(zip(logprobs.tokens, logprobs.text_offset, strict=True)):
        is_shown = "\N{REPLACEMENT CHARACTER}" not in text and "bytes:" not in text and text.strip() not in specials
        if is_shown and i < len(logprobs.tokens) - 1:  # the last one is a stop token
            assert choice.text[offset:].startswith(text)
        top = logprobs.top_logprobs[i]
        if top is not None:
            assert len(top) == num_candidates, "no two tokens are one entry"
            assert top[text] == logprobs.token_logprobs[i], "evaluations look the sampled token up"


@kinds
@given(prompt=SOME, ids=SOME, skip=st.booleans(), shows_stop=st.booleans(), echo=st.booleans())
def test_completions(kind: str, prompt: list[int], ids: list[int], skip: bool, shows_stop: bool, echo: bool) -> None:
    made = events(kind, prompt, ids, skip_special_tokens=skip, include_stop_str_in_output=shows_stop)
    echoes = [locate_tokens(token_bytes(kind), prompt)] if echo else []
    choice = whole(completion_builder(echoes, 4), made)
    assert choice.text == (echoes[0].text if echo else "") + "".join(event.text for event in made)
    assert len(choice.logprobs.tokens) == len(ids) + (len(prompt) if echo else 0)
    specials = {"<s>", "</s>", "[TOOL]"} if skip else set()
    check_completion(choice, 5, specials)
    chunks = streamed(completion_builder(echoes, 4), made)
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for c in chunks for x in getattr(c.logprobs, name)] == getattr(choice.logprobs, name)
    assert "".join(c.text for c in chunks) == choice.text


@kinds
@given(prompt=IDS, ids=SOME, skip=st.booleans(), shows_stop=st.booleans())
def test_chats(kind: str, prompt: list[int], ids: list[int], skip: bool, shows_stop: bool) -> None:
    made = events(kind, [5, *prompt], ids, skip_special_tokens=skip, include_stop_str_in_output=shows_stop)
    choice = whole(ChatBuilder("m", ReplyOptions(3), TokenUsage(0), CONTENT_ONLY), made)
    entries = choice.logprobs.content
    assert len(entries) == len(ids)
    before = Detokenizer(token_bytes(kind), [5, *prompt], skip_special_tokens=skip)._partial
    data = before + bytes(byte for entry in entries for byte in entry.bytes)
    assert data.decode(errors=token_bytes(kind).errors) == choice.message.content
    for entry in entries:
        assert [c.logprob for c in entry.top_logprobs] == [-1.0, -1.5, -2.0]
    chunks = streamed(ChatBuilder("m", ReplyOptions(3), TokenUsage(0), CONTENT_ONLY), made)
    assert [entry for c in chunks if c.logprobs for entry in c.logprobs.content] == entries


def names(kind: str, *tokens: str) -> list[int]:
    tokenizer = SMALL_TOKENIZERS[kind]()
    return [tokenizer.token_to_id(token) for token in tokens]


def test_parts_of_a_character_are_named_as_openai_does() -> None:
    ids = names("llama", "▁Hello", "<0xE2>", "<0x82>", "<0xAC>", "day", "</s>")
    made = events("llama", names("llama", "▁a"), ids)
    choice = whole(completion_builder([], 4), made)
    assert choice.text == " Hello€day"
    assert choice.logprobs.tokens == [" Hello", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "day", "</s>"]
    assert choice.logprobs.text_offset == [0, 6, 6, 6, 7, 10]
    entries = whole(ChatBuilder("m", ReplyOptions(0), TokenUsage(0), CONTENT_ONLY), made).logprobs.content
    assert [entry.token for entry in entries] == [" Hello", r"\xe2", r"\x82", r"\xac", "day", "</s>"]
    assert [entry.bytes for entry in entries] == [list(b" Hello"), [0xE2], [0x82], [0xAC], list(b"day"), []]


def test_tokens_that_differ_in_a_space_or_not_at_all_stay_apart() -> None:
    a, spaced, unknown = *names("llama", "a", "▁a"), PADDED - 1
    table = token_bytes("llama")
    logprobs = TokenLogprobs(-1.0, 1, [spaced, a, unknown, unknown - 1], [-1.0, -2.0, -3.0, -4.0])
    entries = candidates(table, spaced, logprobs)
    event = Event(0, " a", [spaced], [entries], "length", None, [a], 0, text_offsets=[0])
    choice = whole(completion_builder([], 4), [event])
    assert choice.logprobs.top_logprobs == [{" a": -1.0, "a": -2.0, "": -3.0, f"token_id:{unknown - 1}": -4.0}]


def test_echoed_text_keeps_its_own_spaces() -> None:
    """Llama-2's tokenizer puts a space before a text, and a special token that is no part of it."""
    prompt, ids = names("llama", "<s>", "▁Hello", "▁world"), names("llama", "▁good", "day", "</s>")
    echo = locate_tokens(token_bytes("llama"), prompt, "Hello world")
    choice = whole(completion_builder([echo], 4), events("llama", prompt, ids))
    assert choice.text == "Hello world goodday"
    assert choice.logprobs.tokens == ["<s>", "Hello", " world", " good", "day", "</s>"]
    assert choice.logprobs.text_offset == [0, 0, 5, 11, 16, 19]


def test_echoed_ids_that_end_within_a_character() -> None:
    prompt, ids = names("llama", "▁Hello", "<0xE2>", "<0x82>"), names("llama", "<0xAC>", "day", "</s>")
    echo = locate_tokens(token_bytes("llama"), prompt)
    made = events("llama", prompt, ids)
    assert "".join(event.text for event in made) == "€day"
    choice = whole(completion_builder([echo], 4), made)
    assert choice.text == "Hello€day"
    assert choice.logprobs.text_offset == [0, 5, 5, 5, 6, 9]
    assert whole(completion_builder([PromptText("Hello")], None), made).text == "Hello€day"
