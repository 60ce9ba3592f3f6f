"""The HTTP server over a scripted service, for OpenAI's own client, raw HTTP, and nonsense by the thousand.

The last tests run the real service with the demo model, and the command itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, cast

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from pydantic import BaseModel, Field
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lockstep import LLM
from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.engine.recovery import Health
from lockstep.launch.errors import EngineFailed
from lockstep.launch.server import http_io
from lockstep.launch.server.run import bind
from lockstep.launch.server.server_config import ServerConfig, ServerLimits
from lockstep.runtime.config import Config
from lockstep.runtime.request import SamplingParams
from lockstep.runtime.structured_outputs import StructuredOutputsParams
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import (
    CHAT,
    CHAT_BODY,
    COMPLETION,
    KEY,
    MAX_LEN,
    PROMPT,
    Running,
    error_of,
    expected_text,
    fake,
)
from small import COMMAND, SMALL, SMALL_FLAGS
from waiting import wait_until

# -- OpenAI's client


def test_completion(shared: Running, tokenizer: Tokenizer) -> None:
    found = shared.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=8, seed=5)
    ids = tokenizer.encode(PROMPT)
    assert found.object == "text_completion"
    assert found.id.startswith("cmpl-")
    assert found.model == "demo"
    assert found.choices[0].text == expected_text(tokenizer, ids, 8, seed=5)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 8)
    assert found.usage.total_tokens == len(ids) + 8
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 4


def test_prompts_of_every_kind_and_n(shared: Running, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(PROMPT), tokenizer.encode("Blessed")]
    for prompts, kept in (
        ([PROMPT, "Blessed"], ids), (ids, ids), (PROMPT, ids[:1]), (ids[1], ids[1:]),
    ):  # fmt: skip
        found = shared.openai.completions.create(model="demo", prompt=cast(Any, prompts), max_tokens=5, n=3)
        wanted = [expected_text(tokenizer, own, 5, index=i) for own in kept for i in range(3)]
        assert [c.text for c in found.choices] == wanted
        assert [c.index for c in found.choices] == list(range(3 * len(kept)))
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(map(len, kept)), "each prompt counts once, whatever n is"
        assert found.usage.completion_tokens == 15 * len(kept)


def test_streamed_completion_is_the_whole_one(shared: Running) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": [PROMPT, "Blessed"], "max_tokens": 9, "n": 2, "logprobs": 2}
    whole = shared.openai.completions.create(**asked)
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    chunks = list(shared.openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        tokens[choice.index] += choice.logprobs.tokens or []
        offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [c.text for c in whole.choices]
    assert tokens == [c.logprobs.tokens for c in whole.choices if c.logprobs]
    assert offsets == [c.logprobs.text_offset for c in whole.choices if c.logprobs]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completion_logprobs(shared: Running) -> None:
    found = shared.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=4, logprobs=4)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [-2.0] * 4
    assert logprobs.tokens is not None
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(4)]
    assert logprobs.top_logprobs is not None
    for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
        assert top[token] == -2.0
        assert max(top.values()) == -1.0
        assert min(top.values()) == -9999.0, "JSON has no minus infinity"


def test_echo(shared: Running, tokenizer: Tokenizer) -> None:
    plain = shared.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=4).choices[0].text
    for prompt in (PROMPT, tokenizer.encode(PROMPT)):
        found = shared.openai.completions.create(model="demo", prompt=prompt, max_tokens=4, echo=True, n=2)
        assert found.choices[0].text == PROMPT + plain
        assert found.choices[1].text.startswith(PROMPT)
        stream = shared.openai.completions.create(model="demo", prompt=prompt, max_tokens=4, echo=True, stream=True)
        assert "".join(c.choices[0].text for c in stream) == PROMPT + plain


def test_echo_with_logprobs(shared: Running, tokenizer: Tokenizer) -> None:
    """The prompt's tokens before the answer's, as evaluations read them."""
    ids = tokenizer.encode(PROMPT)
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "logprobs": 2}
    plain = shared.openai.completions.create(**asked).choices[0]
    found = shared.openai.completions.create(**asked, echo=True).choices[0]
    assert found.text == PROMPT + plain.text
    assert fake(shared).asked[-1][1].prompt_logprobs == 2
    logprobs = found.logprobs
    assert logprobs is not None
    assert plain.logprobs is not None
    assert logprobs.tokens == [tokenizer.decode([i]) for i in ids] + plain.logprobs.tokens
    assert logprobs.token_logprobs == [None, *[-2.0] * (len(ids) - 1 + 4)]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[len(ids) :] == plain.logprobs.top_logprobs
    starts = [0, *itertools.accumulate(map(len, logprobs.tokens))]
    assert logprobs.text_offset == starts[:-1]
    stream = [c.choices[0] for c in shared.openai.completions.create(**asked, echo=True, stream=True)]
    assert [t for c in stream if c.logprobs for t in c.logprobs.tokens or []] == logprobs.tokens
    assert [t for c in stream if c.logprobs for t in c.logprobs.text_offset or []] == logprobs.text_offset


def test_chat(shared: Running, tokenizer: Tokenizer) -> None:
    found = shared.openai.chat.completions.create(
        model="demo", messages=cast(Any, CHAT), max_completion_tokens=6, n=2, logprobs=True, top_logprobs=3
    )
    ids = tokenizer.encode_chat(CHAT)
    assert found.object == "chat.completion"
    assert [c.message.content for c in found.choices] == [expected_text(tokenizer, ids, 6, index=i) for i in (0, 1)]
    assert {c.message.role for c in found.choices} == {"assistant"}
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for entry in content:
        assert entry.logprob == -2.0
        assert len(entry.top_logprobs) == 3
        assert [c.logprob for c in entry.top_logprobs][:2] == [-1.0, -2.0]
        replaced = "\N{REPLACEMENT CHARACTER}" in entry.token
        assert entry.bytes == (None if replaced else list(entry.token.encode()))


def test_streamed_chat_is_the_whole_one(shared: Running) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 7, "n": 2, "logprobs": True}
    whole = shared.openai.chat.completions.create(**asked)
    texts, tokens = ["", ""], [0, 0]
    roles, ends = [], []
    chunks = list(shared.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.object == "chat.completion.chunk"
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role == "assistant" else []
        ends += [choice.index] if choice.finish_reason else []
        tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [c.message.content for c in whole.choices]
    assert tokens == [7, 7]
    assert sorted(roles) == sorted(ends) == [0, 1]
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices


def test_a_chat_without_max_tokens_goes_to_the_end_of_the_context(shared: Running, tokenizer: Tokenizer) -> None:
    found = shared.openai.chat.completions.create(model="demo", messages=cast(Any, CHAT))
    assert found.usage is not None
    assert found.usage.total_tokens == MAX_LEN
    completion = shared.openai.completions.create(model="demo", prompt=PROMPT)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16, "OpenAI's default for completions"


def test_text_parts_and_developers(shared: Running, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = [{"role": "developer", "content": parts}, {"role": "assistant", "content": "x", "refusal": None}, *CHAT]
    shared.openai.chat.completions.create(model="demo", messages=cast(Any, asked), max_tokens=1)
    plain = [{"role": "system", "content": "one\ntwo"}, {"role": "assistant", "content": "x"}, *CHAT]
    assert fake(shared).asked[-1][0] == tokenizer.encode_chat(plain)


def test_every_sampling_parameter_arrives(shared: Running) -> None:
    asked: dict[str, Any] = {
        "n": 2, "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": 1.5}, "max_tokens": 4, "min_tokens": 2,
        "stop": ["a", "b"], "stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True,
        "logprobs": 3, "seed": -9, "skip_special_tokens": False,
    }  # fmt: skip
    assert shared.post("/v1/completions", {"prompt": PROMPT, "user": "me", **asked}).status_code == 200
    assert fake(shared).asked[-1][1] == SamplingParams(**asked | {"logit_bias": {5: 1.5}})
    here = {*asked, "structured_outputs", "prompt_logprobs"}  # the last through echo
    assert here == set(SamplingParams.__struct_fields__), "what can be asked offline can be asked here"
    assert shared.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}).status_code == 200
    assert fake(shared).asked[-1][1] == SamplingParams(temperature=0.7, max_tokens=3), "the model's recommendation"


ASKED_FOR = {  # in each way to say it, and what it means
    "openai": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True,
        "schema": {"type": "integer"}}}}, {"json": {"type": "integer"}}),
    "openai without a schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"json_object": True}),
    "openai json_object": ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    "vllm": ({"structured_outputs": {"json": "{}", "disable_any_whitespace": True}},
        {"json": "{}", "disable_any_whitespace": True}),
    "vllm regex": ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
    "vllm with neutral fields": ({"structured_outputs": {"regex": "a+", "disable_fallback": True,
        "disable_additional_properties": False, "structural_tag": None}}, {"regex": "a+"}),
    "old json": ({"guided_json": {"type": "null"}}, {"json": {"type": "null"}}),
    "old regex": ({"guided_regex": "a+"}, {"regex": "a+"}),
    "old choice": ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    "old grammar": ({"guided_grammar": "root ::= x"}, {"grammar": "root ::= x"}),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "meant"), ASKED_FOR.values(), ids=ASKED_FOR)
def test_every_way_to_ask_for_a_structure_arrives(
    shared: Running, asked: dict[str, Any], meant: dict[str, Any]
) -> None:
    for route, body in (("completions", COMPLETION), ("chat/completions", CHAT_BODY)):
        found = shared.post(f"/v1/{route}", {**body, **asked})
        assert found.status_code == 200, found.text
        assert fake(shared).asked[-1][1].structured_outputs == StructuredOutputsParams(**meant)


NEUTRAL = {
    "tool_choice": "none", "tools": None, "response_format": {"type": "text"}, "modalities": ["text"],
    "store": False, "service_tier": "auto", "parallel_tool_calls": True, "logit_bias": None, "stop": None,
    "temperature": None, "stream": False, "stream_options": None, "reasoning_effort": None,
}  # fmt: skip


def test_values_that_change_nothing_are_taken(shared: Running) -> None:
    found = shared.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, **NEUTRAL})
    assert found.status_code == 200, found.text


def test_models_and_version(shared: Running) -> None:
    (model,) = shared.openai.models.list().data
    assert (model.id, model.owned_by, model.model_extra) == ("demo", "lockstep", {"max_model_len": MAX_LEN})
    assert shared.http.get("/version").json()["version"]


def test_tokenize_and_back(shared: Running, tokenizer: Tokenizer) -> None:
    found = shared.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(PROMPT)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), MAX_LEN)
    assert "".join(found["token_strs"]) == "<|bos|>" + PROMPT
    assert shared.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "<|bos|>" + PROMPT}
    assert shared.post("/tokenize", {"messages": CHAT}).json()["tokens"] == tokenizer.encode_chat(CHAT)


def test_served_model_names(run: Callable[..., Running]) -> None:
    running = run(served_model_name=["big", "small"])
    assert [m.id for m in running.openai.models.list()] == ["big", "small"]
    assert running.openai.completions.create(model="small", prompt="a", max_tokens=1).model == "small"
    with pytest.raises(openai.NotFoundError):
        running.openai.completions.create(model="demo", prompt="a")


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
    ],
)
def test_errors_are_the_clients_own(shared: Running, asked: dict[str, Any], kind: type[openai.APIStatusError]) -> None:
    with pytest.raises(kind) as caught:
        shared.openai.chat.completions.create(**({"model": "demo", "messages": CHAT} | asked))
    assert caught.value.param == next(iter(asked)) or caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"


# -- bad requests: the table of /work's reference, row by row. COMPLETION and CHAT_BODY are good; a row spoils them.

GONE = ...  # in place of a value: the field is left out
BAD: list[tuple[str, dict[str, Any], str, str | None]] = [  # body, changes, param, code
    ("completions", {"prompt": GONE}, "prompt", "missing_required_parameter"),
    ("chat/completions", {"messages": GONE}, "messages", "missing_required_parameter"),
    ("completions", {"prompt": 5}, "prompt", "invalid_type"),
    ("completions", {"prompt": None}, "prompt", "invalid_type"),
    ("completions", {"prompt": ""}, "prompt", None),
    ("completions", {"prompt": []}, "prompt", None),
    ("completions", {"prompt": [[]]}, "prompt", None),
    ("completions", {"prompt": ["a", ""]}, "prompt", None),
    ("completions", {"prompt": ["a", 5]}, "prompt", "invalid_type"),
    ("completions", {"prompt": [-1]}, "prompt", None),
    ("completions", {"prompt": [2048]}, "prompt", "invalid_value"),
    ("completions", {"prompt": [1, 2.5]}, "prompt", None),
    ("completions", {"prompt": [2**70]}, "prompt", None),
    ("completions", {"prompt": [[1], [True]]}, "prompt", None),
    ("completions", {"prompt": ["a"] * 129}, "prompt", "array_above_max_length"),
    ("completions", {"prompt": [5] * MAX_LEN}, "prompt", "context_length_exceeded"),
    ("completions", {"prompt": [5] * 10, "max_tokens": MAX_LEN - 9}, "prompt", "context_length_exceeded"),
    ("chat/completions", {"messages": []}, "messages", "invalid_value"),
    ("chat/completions", {"messages": "hello"}, "messages", "invalid_type"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ("chat/completions", {"messages": [*CHAT, {"role": "user", "content": None}]}, "messages[1].content",
        "invalid_type"),
    ("chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages[0].content", None),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name",
        "unsupported_parameter"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour",
        "unknown_parameter"),
    ("chat/completions", {"max_tokens": MAX_LEN}, "messages", "context_length_exceeded"),
    ("completions", {"model": "gpt-4"}, "model", "model_not_found"),
    ("completions", {"n": 129}, "n", "integer_above_max_value"),
    ("completions", {"n": 9}, "n", "integer_above_max_value"),  # max_num_seqs is 8
    ("completions", {"n": 0}, "n", "integer_below_min_value"),
    ("completions", {"n": "2"}, "n", "invalid_type"),
    ("completions", {"n": True}, "n", "invalid_type"),
    ("completions", {"n": 10**30}, "n", "integer_above_max_value"),
    ("completions", {"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ("completions", {"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ("completions", {"temperature": float("nan")}, "temperature", "invalid_value"),
    ("completions", {"temperature": float("inf")}, "temperature", "invalid_value"),
    ("completions", {"top_p": 0}, "top_p", "decimal_below_min_value"),
    ("completions", {"top_p": 1.01}, "top_p", "decimal_above_max_value"),
    ("completions", {"top_k": 0.01}, "top_k", "invalid_type"),
    ("completions", {"top_k": -2}, "top_k", "integer_below_min_value"),
    ("completions", {"min_p": 2}, "min_p", "decimal_above_max_value"),
    ("completions", {"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
    ("completions", {"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value"),
    ("completions", {"frequency_penalty": -2.5}, "frequency_penalty", "decimal_below_min_value"),
    ("completions", {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ("completions", {"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ("completions", {"min_tokens": 5}, "min_tokens", "invalid_value"),
    ("chat/completions", {"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ("chat/completions", {"logprobs": 5}, "logprobs", "invalid_type"),
    ("completions", {"logprobs": 21}, "logprobs", "integer_above_max_value"),
    ("completions", {"logprobs": -1}, "logprobs", "integer_below_min_value"),
    ("completions", {"stop": list("abcde")}, "stop", "array_above_max_length"),
    ("completions", {"stop": ""}, "stop", None),
    ("completions", {"stop": ["a", ""]}, "stop", None),
    ("completions", {"stop": "x" * 2000}, "stop", None),
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias", None),
    ("completions", {"logit_bias": {"2048": 1}}, "logit_bias", "invalid_value"),
    ("completions", {"logit_bias": {"-1": 1}}, "logit_bias", None),
    ("completions", {"logit_bias": {"5": 101}}, "logit_bias", "decimal_above_max_value"),
    ("completions", {"logit_bias": {"5": "1"}}, "logit_bias", "invalid_type"),
    ("completions", {"logit_bias": [5]}, "logit_bias", "invalid_type"),
    ("completions", {"stop_token_ids": [2048]}, "stop_token_ids", "invalid_value"),
    ("completions", {"seed": 2**63}, "seed", "integer_above_max_value"),
    ("completions", {"seed": 1.5}, "seed", "invalid_type"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ("completions", {"best_of": 2}, "best_of", "unsupported_parameter"),
    ("completions", {"suffix": "x"}, "suffix", "unsupported_parameter"),
    ("completions", {"temprature": 1}, "temprature", "unknown_parameter"),
    ("completions", {"temprature": None}, "temprature", "unknown_parameter"),
    ("completions", {"content": "x"}, "content", "unknown_parameter"),  # a field of a message
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "stop": "y"}]}, "messages[0].stop",
        "unknown_parameter"),
    ("completions", {"stream": True, "stream_options": {"tools": None}}, "stream_options.tools", "unknown_parameter"),
    ("completions", {"x" * 10_000: 1}, "x" * 61 + "...", "unknown_parameter"),
    *[("chat/completions", {name: value}, name, "unsupported_parameter") for name, value in {
        "tools": [{"type": "function"}], "tool_choice": "auto", "functions": [], "function_call": "auto",
        "guided_decoding_backend": "x", "guided_whitespace_pattern": " ", "audio": {"voice": "x"},
        "modalities": ["text", "audio"], "chat_template": "{{ 1 }}", "chat_template_kwargs": {"a": 1},
        "prompt_logprobs": 1, "use_beam_search": True,
        "reasoning_effort": "low", "best_of": 2, "store": True, "metadata": {}, "priority": 1, "bad_words": ["a"],
        "continue_final_message": True, "prediction": {}, "documents": [],
    }.items()],
    ("completions", {"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
    ("completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema",
        "missing_required_parameter"),
    ("completions", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name", "missing_required_parameter"),
    ("completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        "response_format.json_schema.schema", "invalid_type"),
    ("completions", {"structured_outputs": {}}, "structured_outputs", "invalid_value"),
    ("completions", {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
    ("completions", {"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag",
        "unsupported_parameter"),
    ("completions", {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
    ("completions", {"guided_regex": "a" * 100_001}, "guided_regex", "invalid_value"),
    ("completions", {"guided_choice": []}, "guided_choice", None),
    ("completions", {"guided_json": 5}, "guided_json", "invalid_type"),
    ("completions", {"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "changes", "param", "code"), BAD, ids=lambda v: None if v is None else str(v)[:40])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_values(
    shared: Running, route: str, changes: dict[str, Any], param: str, code: str | None, stream: bool
) -> None:
    asked = len(fake(shared).asked)
    body = {**(COMPLETION if route == "completions" else CHAT_BODY), **changes}
    if stream and "stream_options" not in changes:
        body["stream"] = True
    content = json.dumps({k: v for k, v in body.items() if v is not GONE})
    response = shared.http.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == code or code is None
    assert param.split(".")[-1][:50] in error["message"] or code == "context_length_exceeded"
    assert len(fake(shared).asked) == asked, "nothing may have been started"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt":' + b"[" * 100_000,
        b'{"prompt": "\\ud800"}', b'{"prompt": ' + b"1" * 5000 + b"}", b'{"prompt": "a"} x', b"\x00",
    ],
    ids=repr,
)  # fmt: skip
def test_malformed_json(shared: Running, content: bytes) -> None:
    response = shared.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types(shared: Running, kind: str) -> None:
    content = json.dumps(COMPLETION).encode()
    response = shared.http.post("/v1/completions", content=content, headers={"content-type": kind} if kind else {})
    assert response.status_code == 400
    assert "content-type" in error_of(response)["message"]


def test_other_routes_and_methods(shared: Running) -> None:
    for path in ("/v2", "/v1/nothing", "/v1/models/", "/docs", "/v1/embeddings"):
        response = shared.http.get(path)
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = shared.http.get("/v1/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert shared.http.delete("/v1/models").status_code == 405


def test_an_answer_is_bounded_whatever_was_sent(shared: Running) -> None:
    for body in (
        {f"field{i}": 1 for i in range(100_000)},
        {"prompt": ["x"] * 100_000 + [1]},
        {"prompt": [{"a": "b" * 100}] * 10_000},
        {"prompt": "x", "stop": ["y" * 2000] * 1000},
        {"prompt": "x", "logit_bias": {f"x{i}": 1 for i in range(50_000)}},
        {"prompt": "x", "model": "m" * 10**6},
    ):
        response = shared.post("/v1/completions", body)
        assert 400 <= response.status_code < 500
        error_of(response)  # checks the length


def test_tokenize_refuses_too(shared: Running) -> None:
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": CHAT}), ("/detokenize", {"tokens": [5000]}),
        ("/detokenize", {"tokens": ["a"]}), ("/tokenize", {"prompt": "a", "add_special_tokens": False}),
    ):  # fmt: skip
        response = shared.post(path, body)
        assert response.status_code == 400
        assert error_of(response)["param"] in ("prompt", "tokens", "tokens[0]", "add_special_tokens")


def test_two_thousand_bad_requests_change_nothing(shared: Running) -> None:
    golden = {**COMPLETION, "seed": 3, "n": 2, "logprobs": 2}

    def answer() -> Any:
        found = shared.post("/v1/completions", golden).json()
        return {k: v for k, v in found.items() if k not in ("id", "created")}

    before = answer()
    for i in range(2000):
        route, changes, _, _ = BAD[i % len(BAD)]
        body = {**(COMPLETION if route == "completions" else CHAT_BODY), **changes}
        content = json.dumps({k: v for k, v in body.items() if v is not GONE})
        response = shared.http.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404)
    assert json.dumps(answer()) == json.dumps(before)
    assert fake(shared).live == 0


# -- limits


def test_limits_are_flags(run: Callable[..., Running]) -> None:
    running = run(max_input_tokens=10, max_total_tokens=20, max_n=2, max_stop_strings=1, max_client_batch_size=2,
                  max_logprobs=1)  # fmt: skip
    for changes in (
        {"prompt": [5] * 11}, {"prompt": [5] * 10, "max_tokens": 11}, {"n": 3}, {"stop": ["a", "b"]},
        {"prompt": ["a"] * 3}, {"logprobs": 2},
    ):  # fmt: skip
        response = running.post("/v1/completions", COMPLETION | changes)
        assert response.status_code == 400, changes
    allowed = {"prompt": [[5] * 10] * 2, "max_tokens": 10, "n": 2, "stop": ["a"], "logprobs": 1}
    assert running.post("/v1/completions", COMPLETION | allowed).status_code == 200


@pytest.mark.parametrize(("options", "busy"), [({"max_concurrent_requests": 2}, 2), ({"max_queued": 0}, 8)])
def test_too_many_requests(run: Callable[..., Running], options: dict[str, int], busy: int) -> None:
    running = run(**options)
    service = fake(running)
    service.paused = True
    threads = [threading.Thread(target=running.post, args=("/v1/completions", COMPLETION)) for _ in range(busy)]
    for thread in threads:
        thread.start()
    wait_until(lambda: service.live == busy)
    response = running.post("/v1/completions", COMPLETION)
    assert response.status_code == 429
    assert error_of(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        running.openai.chat.completions.create(**cast(Any, CHAT_BODY))
    service.paused = False
    for thread in threads:
        thread.join()
    assert running.post("/v1/completions", COMPLETION).status_code == 200, "places are given back"
    service.waiting = 2000  # in the engine, for want of KV cache
    assert running.post("/v1/completions", COMPLETION).status_code == 429


def test_long_bodies(run: Callable[..., Running]) -> None:
    running = run(max_body_bytes=10_000)
    assert running.post("/v1/completions", COMPLETION | {"user": "x" * 9000}).status_code == 200
    response = running.post("/v1/completions", COMPLETION | {"user": "x" * 10_000})
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")

    with socket.create_connection(running.port.getsockname(), timeout=10) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        raw.sendall(b"transfer-encoding: chunked\r\n\r\n" + (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 11)
        assert raw.recv(100).startswith(b"HTTP/1.1 413"), "without a content-length, and before the end"


def test_long_headers(shared: Running) -> None:
    with socket.create_connection(shared.port.getsockname(), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 100_000)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_keys(run: Callable[..., Running]) -> None:
    running = run(api_key=[KEY, "other"])
    routes = ["/v1/models", "/version", "/metrics", "/openapi.json", "/nothing"]
    for path in routes:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": KEY},
        ):
            response = running.http.get(path, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        assert running.http.get(path, headers={"authorization": "Bearer other"}).status_code in (200, 404)
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert running.post(path, {}).status_code == 401
    assert running.http.get("/health").status_code == 200
    assert running.openai.models.list().data
    with pytest.raises(openai.AuthenticationError):
        running.openai.with_options(api_key="wrong").models.list()


# -- clients that leave, ranks that fail, servers that end


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_leaves_is_cancelled_within_a_step(
    run: Callable[..., Running], stream: bool, prompts: int
) -> None:
    running = run()
    service = fake(running)
    service.step_s = 0.05
    body = json.dumps({**COMPLETION, "prompt": [PROMPT] * prompts, "max_tokens": 400, "n": 2, "stream": stream})
    raw = socket.create_connection(running.port.getsockname())
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    raw.sendall(f"{head}\r\n\r\n{body}".encode())
    wait_until(lambda: service.steps > 3)
    left = service.steps
    raw.close()
    wait_until(lambda: len(service.cancelled) == prompts)
    assert max(service.cancelled) - left < 100 * prompts, "of 400 steps each"
    assert service.live == 0
    assert running.post("/v1/completions", {**COMPLETION, "max_tokens": 1}).status_code == 200


def test_a_storm_of_clients_that_leave(run: Callable[..., Running]) -> None:
    running = run(max_concurrent_requests=64)
    fake(running).step_s = 0.002
    for i in range(50):
        with running.http.stream(
            "POST", "/v1/completions", json={**COMPLETION, "max_tokens": 400, "stream": True}
        ) as s:
            for _, _ in zip(range(i % 3), s.iter_lines(), strict=False):
                pass
    wait_until(lambda: fake(running).live == 0)
    assert running.post("/v1/completions", COMPLETION).status_code == 200


def test_recovery_is_a_pause(run: Callable[..., Running]) -> None:
    running = run()
    service = fake(running)
    service.step_s = 0.01
    whole = running.post("/v1/completions", {**COMPLETION, "max_tokens": 30}).json()["choices"][0]["text"]
    stream = running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=30, stream=True)
    text = next(iter(stream)).choices[0].text
    service.health, service.paused = Health("recovering", "rank 1 died: signal 9", restarts=1), True
    response = running.http.get("/health")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "rank 1 died" in error_of(response)["message"]
    new: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: new.append(running.post("/v1/completions", COMPLETION)))
    thread.start()  # waits as well
    time.sleep(0.1)
    assert not new
    service.health, service.paused = Health("ready", restarts=1), False
    assert running.http.get("/health").status_code == 200
    assert text + "".join(c.choices[0].text for c in stream) == whole
    thread.join()
    assert new[0].status_code == 200


def test_failure_is_told(run: Callable[..., Running]) -> None:
    running = run()
    service = fake(running)
    service.fails = EngineFailed("rank 1 died too often")
    response = running.post("/v1/completions", COMPLETION)
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_failed")
    assert "retry-after" in response.headers
    with pytest.raises(openai.APIError, match="rank 1 died too often"):
        list(running.openai.chat.completions.create(model="demo", messages=cast(Any, CHAT), stream=True))
    service.health = Health("failed", "rank 1 died too often")
    for call in (lambda: running.post("/v1/completions", COMPLETION), lambda: running.http.get("/health"),
                 lambda: running.http.get("/v1/models")):  # fmt: skip
        response = call()
        assert response.status_code == 503
        assert "rank 1 died too often" in error_of(response)["message"]


def test_health_proves_progress(run: Callable[..., Running]) -> None:
    running = run(limits=ServerLimits(stall_timeout_s=0.3))
    assert running.http.get("/health").json() == {"status": "ok"}
    service = fake(running)
    service.paused = True
    threading.Thread(target=running.post, args=("/v1/completions", COMPLETION)).start()
    wait_until(lambda: service.live == 1)
    wait_until(lambda: running.http.get("/health").status_code == 503)
    assert "no step for" in error_of(running.http.get("/health"))["message"]
    service.paused = False
    wait_until(lambda: running.http.get("/health").status_code == 200)
    time.sleep(0.4)
    assert running.http.get("/health").status_code == 200, "idle is healthy"


def test_a_signal_drains(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=10)
    service = fake(running)
    service.step_s = 0.01
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=60, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    wait_until(lambda: service.health.state == "draining")
    response = running.post("/v1/completions", COMPLETION)
    assert (response.status_code, error_of(response)["code"]) == (503, "draining")
    assert running.http.get("/health").status_code == 503
    assert list(stream)[-1].choices[0].finish_reason == "length"
    running.thread.join(30)
    assert not running.thread.is_alive()
    assert running.server.forced_by is None


def test_draining_ends(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=0.1)
    fake(running).step_s = 0.01
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=480, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError, match="shutting down"):
        list(stream)
    running.thread.join(30)
    assert not running.thread.is_alive()


def test_a_second_signal_ends_at_once(run: Callable[..., Running]) -> None:
    running = run(drain_timeout=60)
    fake(running).step_s = 0.05
    stream = iter(running.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=480, stream=True))
    next(stream)
    running.server.handle_exit(signal.SIGTERM, None)
    running.server.handle_exit(signal.SIGINT, None)
    running.thread.join(30)
    assert not running.thread.is_alive()
    assert running.server.forced_by == signal.SIGINT


def test_a_fault_of_ours_is_one_answer(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: Any) -> None:
        raise ZeroDivisionError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(shared.service, "generate", fault)
        for stream in (False, True):
            response = shared.post("/v1/completions", {**COMPLETION, "stream": stream})
            assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
            assert "secret" not in response.text
    assert shared.post("/v1/completions", COMPLETION).status_code == 200


# -- metrics, logs, the loop


def test_metrics(run: Callable[..., Running]) -> None:
    running = run()
    running.post("/v1/completions", {**COMPLETION, "n": 2, "prompt": [5, 6, 7]})
    response = running.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = {
        name: float(value) for name, value in re.findall(r"^(lockstep:\S+) (\S+)$", response.text, re.M)
    }  # fmt: skip
    label = '{model_name="demo"}'
    assert found[f"lockstep:prompt_tokens_total{label}"] == 3
    assert found[f"lockstep:generation_tokens_total{label}"] == 8
    assert found['lockstep:request_success_total{finished_reason="length",model_name="demo"}'] == 2
    assert found[f"lockstep:time_to_first_token_seconds_count{label}"] == 1
    assert found[f"lockstep:inter_token_latency_seconds_count{label}"] == 6
    assert found[f"lockstep:request_time_per_output_token_seconds_count{label}"] == 2
    assert found[f"lockstep:e2e_request_latency_seconds_count{label}"] == 2
    assert found[f"lockstep:kv_cache_usage_perc{label}"] == 0.25
    assert found[f"lockstep:kv_cache_free_pages{label}"] == 384
    assert found[f"lockstep:num_requests_running{label}"] == found[f"lockstep:num_requests_waiting{label}"] == 0
    assert found[f"lockstep:prefix_cache_hits_total{label}"] == 10
    assert found[f"lockstep:prefix_cache_queries_total{label}"] == 40
    assert found[f"lockstep:num_preemptions_total{label}"] == 3


def test_log_lines_have_no_prompts(run: Callable[..., Running], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    running = run(log_requests=True)
    running.post("/v1/completions", {**COMPLETION, "prompt": "a secret word"})
    running.post("/v1/completions", {**COMPLETION, "prompt": "a secret word", "temperature": 9})
    assert "request answered: 1 prompts of" in caplog.text
    assert "secret" not in caplog.text


def test_long_prompts_do_not_stop_the_others(
    shared: Running, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, answered = threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slow(text: str) -> list[int]:
        if text == "slow":
            started.set()
            assert answered.wait(60)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", slow)
    thread = threading.Thread(target=shared.post, args=("/v1/completions", {**COMPLETION, "prompt": "slow"}))
    thread.start()
    assert started.wait(60)
    assert shared.post("/v1/completions", COMPLETION).status_code == 200
    answered.set()
    thread.join()


def test_a_body_is_parsed_off_the_loop_when_it_is_long(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    parse = http_io._parse

    def spy(content: bytes, model: Any) -> Any:
        seen.append(threading.current_thread().name)
        return parse(content, model)

    monkeypatch.setattr(http_io, "_parse", spy)
    shared.post("/v1/completions", COMPLETION)
    shared.post("/v1/completions", {**COMPLETION, "user": "x" * 100_000})
    assert seen[0] == shared.thread.name
    assert seen[1] != shared.thread.name


# -- nonsense by the thousand

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]  # fmt: skip


POSTS = ["POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"]
GETS = ["GET /v1/models", "GET /health", "GET /version", "GET /metrics"]  # they take no data that could be wrong
WITHIN, OUTSIDE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("mode", "route"),
    [(WITHIN, route) for route in POSTS + GETS] + [(OUTSIDE, route) for route in POSTS],
    ids=lambda v: v.value if isinstance(v, GenerationMode) else v,
)
def test_the_api_keeps_to_its_own_description(shared: Running, mode: GenerationMode, route: str) -> None:
    schema = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    operations = {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}
    assert set(operations) == {*POSTS, *GETS}
    seen: list[int] = []

    @settings(max_examples=max(10, settings().max_examples // 2), suppress_health_check=list(HealthCheck))
    @given(case=operations[route].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        seen.append(case.call_and_validate(checks=CHECKS, timeout=20).status_code)

    check()
    assert (200 if mode is WITHIN else 400) in seen
    assert fake(shared).live == 0


def test_every_route_documents_its_answers(shared: Running) -> None:
    described = shared.http.get("/openapi.json").json()
    for path, methods in described["paths"].items():
        (operation,) = methods.values()
        assert {"200", "400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"]), path
        assert "422" not in operation["responses"]


# -- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port=70000 must be between 0 and 65535"),
        ({"max_n": 129}, "max_n=129 must be between 1 and 128"),
        ({"max_logprobs": 21}, "max_logprobs=21 must be between 0 and 20"),
        ({"max_stop_strings": 17}, "max_stop_strings=17"),
        ({"max_body_bytes": 0}, "max_body_bytes=0 must be at least 1"),
        ({"drain_timeout": -1.0}, "drain_timeout=-1.0"),
        ({"drain_timeout": float("nan")}, "drain_timeout=nan"),
        ({"api_key": [""]}, "an empty api_key"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**options)


def test_a_port_that_is_taken_is_known_before_the_model_is_loaded(shared: Running) -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1 port"):
        bind(ServerConfig(port=shared.port.getsockname()[1]))
    with pytest.raises(ValueError, match="not an address to listen on"):
        bind(ServerConfig(host="no such host"))


def test_small_answers_are_not_held_back(shared: Running) -> None:
    with socket.create_connection(shared.port.getsockname()):
        wait_until(lambda: bool(shared.server.server_state.connections))
        for connection in shared.server.server_state.connections:
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "40 ms an answer otherwise"


# -- the real service, and the command

SERVE = ["serve", *SMALL_FLAGS]


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    service = AsyncEngine(Config(**SMALL))
    service.start()
    running = Running(service, served_model_name=["demo"])
    yield running
    running.close()
    asyncio.run(service.close())


def test_the_demo_model_says_what_it_says_offline(real: Running) -> None:
    params = SamplingParams(n=2, seed=5, max_tokens=12, temperature=0.8, logprobs=2, stop="the")
    with LLM(**SMALL) as llm:
        wanted = llm.generate([PROMPT, "Blessed"], params, use_tqdm=False)
        answer = llm.chat([CHAT], SamplingParams(max_tokens=9, temperature=0), use_tqdm=False)[0].outputs[0]
    asked: dict[str, Any] = {
        "model": "demo", "prompt": [PROMPT, "Blessed"], "n": 2, "seed": 5, "max_tokens": 12, "temperature": 0.8,
        "top_p": 1, "logprobs": 2, "stop": "the", "extra_body": {"top_k": 0},
    }  # fmt: skip
    outputs = [o for r in wanted for o in r.outputs]
    found = real.openai.completions.create(**asked)
    assert [c.text for c in found.choices] == [o.text for o in outputs]
    assert [c.finish_reason for c in found.choices] == [o.finish_reason for o in outputs]
    for choice, output in zip(found.choices, outputs, strict=True):
        assert choice.logprobs is not None
        # Which requests share a batch depends on their arrival, and the batch changes the last bits of a sum.
        assert sum(choice.logprobs.token_logprobs or []) == pytest.approx(output.cumulative_logprob, abs=1e-4)
    texts = [""] * 4
    for chunk in real.openai.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [o.text for o in outputs]
    chat = real.openai.chat.completions.create(
        model="demo", messages=cast(Any, CHAT), max_tokens=9, temperature=0, extra_body={"repetition_penalty": 1}
    )
    assert chat.choices[0].message.content == answer.text


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    tags: Annotated[list[Literal["king", "prophet"]], Field(max_length=3)]


def test_openais_client_parses_structured_outputs(real: Running) -> None:
    """The client makes the schema from the class, and the object from the answer."""
    for seed in range(3):
        parsed = real.openai.chat.completions.parse(
            model="demo", messages=cast(Any, CHAT), response_format=Person, seed=seed, max_tokens=1000, temperature=1
        )
        assert parsed.choices[0].message.parsed is not None
        assert 0 <= parsed.choices[0].message.parsed.age <= 120
    with real.openai.chat.completions.stream(
        model="demo", messages=cast(Any, CHAT), response_format=Person, seed=2, max_tokens=1000, temperature=1
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_a_structure_is_the_same_offline(real: Running) -> None:
    structured = StructuredOutputsParams(regex=r"(Moses|Aaron) (went|spake)( [a-z]{2,6}){2,5}\.")
    params = SamplingParams(n=3, seed=5, temperature=1, max_tokens=60, structured_outputs=structured)
    with LLM(**SMALL) as llm:
        outputs = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs
    found = real.openai.completions.create(
        model="demo", prompt=PROMPT, n=3, seed=5, temperature=1, max_tokens=60,
        top_p=1, extra_body={"guided_regex": structured.regex, "top_k": 0},
    )  # fmt: skip
    assert [c.text for c in found.choices] == [o.text for o in outputs]
    assert all(re.fullmatch(structured.regex or "", c.text) for c in found.choices)


REFUSED: list[tuple[dict[str, Any], str, str]] = [  # a body, the field to blame, what is said of it
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?<=a)b"}, "guided_regex", "look-around"),
    ({"structured_outputs": {"regex": "(" * 9000 + ")" * 9000}}, "structured_outputs", "nest"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format", "Unimplemented keys"),
    ({"guided_json": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}},
        "guided_json", "schema too large"),
    ({"guided_json": {"enum": [f"{i * 7919}" * 2 for i in range(5000)]}}, "guided_json", "limit"),
    ({"guided_grammar": "root ::= " * 3000}, "guided_grammar", "Expected name"),
]  # fmt: skip


def test_hostile_grammars_are_refused_while_a_stream_goes_on(real: Running) -> None:
    body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    wanted = real.post("/v1/completions", body).json()["choices"][0]["text"]
    text, refused = "", iter(REFUSED)
    with real.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            changes, param, said = next(refused, (None, "", ""))
            if changes is not None:
                answer = real.post("/v1/completions", {**COMPLETION, **changes})
                assert answer.status_code == 400, answer.text
                assert error_of(answer)["param"] == param
                assert said in error_of(answer)["message"]
    assert text == wanted
    assert next(refused, None) is None, "all of them came while the stream was going on"


@pytest.mark.parametrize("fault", ["slow", "killed"])
def test_a_compiler_that_hangs_or_dies_costs_one_request(
    real: Running, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    body = {**COMPLETION, "guided_regex": f"a{{{len(fault)}}}", "max_tokens": 9}
    assert real.post("/v1/completions", {**body, "guided_regex": "first"}).status_code == 200
    grammars = cast(AsyncEngine, real.service)._grammars
    compiler = grammars._process
    assert compiler is not None
    if fault == "slow":
        monkeypatch.setattr(grammars, "time_limit_s", 0.2)
        os.kill(compiler.pid, signal.SIGSTOP)
    else:
        os.kill(compiler.pid, signal.SIGKILL)
    answer = real.post("/v1/completions", body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "guided_regex"
    assert ("takes more than 0.2 s" if fault == "slow" else "4 GiB of memory") in error_of(answer)["message"]
    monkeypatch.undo()
    assert real.post("/v1/completions", body).json()["choices"][0]["text"] == "a" * len(fault)
    wait_until(lambda: compiler._process.poll() is not None)


def test_the_real_service_frees_what_a_client_leaves(real: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1000, "n": 4, "ignore_eos": True, "stream": True}
    with real.http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        assert real.service.stats().num_live == 4
    wait_until(lambda: real.service.stats().num_live == 0)
    assert real.http.get("/health").status_code == 200


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`lockstep serve` in a process of its own."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [*COMMAND, *SERVE, *arguments]
        environment = os.environ | {"LOCKSTEP_API_KEY": KEY}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise AssertionError("the server ended before it served")


@pytest.mark.process
def test_the_command(serve: Callable[..., subprocess.Popen[str]]) -> None:
    process = serve("--port=0", "--served-model-name=demo")
    url = address(process)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=5)
    assert client.completions.create(model="demo", prompt=PROMPT, temperature=0, max_tokens=3).choices[0].text
    assert httpx.get(f"{url}/v1/models").status_code == 401, "the key came from the environment"
    stream = iter(client.completions.create(model="demo", prompt=PROMPT, max_tokens=60, stream=True))
    next(stream)
    process.send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason in ("length", "stop"), "live requests may end"
    assert process.wait(30) == 0


@pytest.mark.process
def test_two_signals_end_the_command_at_once(serve: Callable[..., subprocess.Popen[str]]) -> None:
    process = serve("--port=0")
    url = address(process)
    body = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
    ) as response:
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT


@pytest.mark.process
@pytest.mark.parametrize("after_s", [0.1, 1.0, 2.5])
def test_a_signal_while_it_starts(serve: Callable[..., subprocess.Popen[str]], after_s: float) -> None:
    process = serve("--port=0", "--drain-timeout=0")
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    assert "Traceback" not in said


@pytest.mark.process
def test_bad_flags_are_one_line(serve: Callable[..., subprocess.Popen[str]], shared: Running) -> None:
    for flag, message in (
        (f"--port={shared.port.getsockname()[1]}", "error: cannot listen on 127.0.0.1 port"),
        ("--max-n=1000", "error: max_n=1000 must be between 1 and 128"),
    ):
        process = serve(flag)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert said.strip().splitlines()[-1].startswith(message)
