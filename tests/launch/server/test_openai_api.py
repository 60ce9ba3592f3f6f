"""The routes of OpenAI's API over a scripted engine, mostly through OpenAI's own client."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import openai
import pytest

from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.structured_outputs import StructuredOutputsParams
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, CHAT_BODY, COMPLETION, MAX_LEN, PROMPT, Running, expected_text, fake


def test_completion(shared: Running, tokenizer: Tokenizer) -> None:
    response = shared.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=8, seed=5)
    ids = tokenizer.encode(PROMPT)
    assert response.object == "text_completion"
    assert response.id.startswith("cmpl-")
    assert response.model == "demo"
    assert response.choices[0].text == expected_text(tokenizer, ids, 8, seed=5)
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (len(ids), 8)
    assert response.usage.total_tokens == len(ids) + 8
    assert response.usage.prompt_tokens_details is not None
    assert response.usage.prompt_tokens_details.cached_tokens == 4


def test_prompt_kinds_and_n(shared: Running, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(PROMPT), tokenizer.encode("Blessed")]
    for prompts, kept in (
        ([PROMPT, "Blessed"], ids), (ids, ids), (PROMPT, ids[:1]), (ids[1], ids[1:]),
    ):  # fmt: skip
        response = shared.openai.completions.create(model="demo", prompt=cast(Any, prompts), max_tokens=5, n=3)
        expected = [expected_text(tokenizer, prompt, 5, index=i) for prompt in kept for i in range(3)]
        assert [c.text for c in response.choices] == expected
        assert [c.index for c in response.choices] == list(range(3 * len(kept)))
        assert response.usage is not None
        assert response.usage.prompt_tokens == sum(map(len, kept)), "each prompt counts once, whatever n is"
        assert response.usage.completion_tokens == 15 * len(kept)


def test_streamed_completion_equals_whole(shared: Running) -> None:
    request: dict[str, Any] = {"model": "demo", "prompt": [PROMPT, "Blessed"], "max_tokens": 9, "n": 2, "logprobs": 2}
    expected = shared.openai.completions.create(**request)
    texts, tokens, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    chunks = list(shared.openai.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        assert choice.logprobs is not None
        tokens[choice.index] += choice.logprobs.tokens or []
        offsets[choice.index] += choice.logprobs.text_offset or []
    assert texts == [c.text for c in expected.choices]
    assert tokens == [c.logprobs.tokens for c in expected.choices if c.logprobs]
    assert offsets == [c.logprobs.text_offset for c in expected.choices if c.logprobs]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == expected.usage
    assert len({c.id for c in chunks}) == 1


def test_completion_logprobs(shared: Running) -> None:
    response = shared.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=4, logprobs=4)
    logprobs = response.choices[0].logprobs
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
    for prompt, echoed in ((PROMPT, PROMPT), (tokenizer.encode(PROMPT), f"<|bos|>{PROMPT}")):
        response = shared.openai.completions.create(model="demo", prompt=prompt, max_tokens=4, echo=True, n=2)
        assert response.choices[0].text == echoed + plain, "ids are echoed with all special tokens, as in vLLM"
        assert response.choices[1].text.startswith(echoed)
        stream = shared.openai.completions.create(model="demo", prompt=prompt, max_tokens=4, echo=True, stream=True)
        assert "".join(c.choices[0].text for c in stream) == echoed + plain


def test_echo_with_logprobs(shared: Running, tokenizer: Tokenizer) -> None:
    """The log-probabilities begin with those of the prompt, which evaluations read."""
    ids = tokenizer.encode(PROMPT)
    request: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 4, "logprobs": 2}
    plain = shared.openai.completions.create(**request).choices[0]
    response = shared.openai.completions.create(**request, echo=True).choices[0]
    assert response.text == PROMPT + plain.text
    assert fake(shared).asked[-1][1].prompt_logprobs == 2
    logprobs = response.logprobs
    assert logprobs is not None
    assert plain.logprobs is not None
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert logprobs.tokens == texts + plain.logprobs.tokens
    assert logprobs.token_logprobs == [None, *[-2.0] * (len(ids) - 1 + 4)]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[len(ids) :] == plain.logprobs.top_logprobs
    starts = [0, *itertools.accumulate(map(len, logprobs.tokens[1:]), initial=0)]  # <|bos|> is not in the text
    assert logprobs.text_offset == starts[:-1]
    stream = [c.choices[0] for c in shared.openai.completions.create(**request, echo=True, stream=True)]
    assert [t for c in stream if c.logprobs for t in c.logprobs.tokens or []] == logprobs.tokens
    assert [t for c in stream if c.logprobs for t in c.logprobs.text_offset or []] == logprobs.text_offset


def test_chat(shared: Running, tokenizer: Tokenizer) -> None:
    response = shared.openai.chat.completions.create(
        model="demo", messages=cast(Any, CHAT), max_completion_tokens=6, n=2, logprobs=True, top_logprobs=3
    )
    ids = tokenizer.encode_chat(CHAT)
    assert response.object == "chat.completion"
    assert [c.message.content for c in response.choices] == [expected_text(tokenizer, ids, 6, index=i) for i in (0, 1)]
    assert {c.message.role for c in response.choices} == {"assistant"}
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(ids)
    assert response.choices[0].logprobs is not None
    content = response.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for entry in content:
        assert entry.logprob == -2.0
        assert len(entry.top_logprobs) == 3
        assert [c.logprob for c in entry.top_logprobs][:2] == [-1.0, -2.0]
        replaced = "\N{REPLACEMENT CHARACTER}" in entry.token
        assert entry.bytes == (None if replaced else list(entry.token.encode()))


def test_streamed_chat_equals_whole(shared: Running) -> None:
    request: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 7, "n": 2, "logprobs": True}
    expected = shared.openai.chat.completions.create(**request)
    texts, tokens = ["", ""], [0, 0]
    roles, ends = [], []
    chunks = list(shared.openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.object == "chat.completion.chunk"
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role == "assistant" else []
        ends += [choice.index] if choice.finish_reason else []
        tokens[choice.index] += len(choice.logprobs.content or []) if choice.logprobs else 0
    assert texts == [c.message.content for c in expected.choices]
    assert tokens == [7, 7]
    assert sorted(roles) == sorted(ends) == [0, 1]
    assert chunks[-1].usage == expected.usage
    assert not chunks[-1].choices


def test_chat_without_max_tokens_fills_the_context(shared: Running, tokenizer: Tokenizer) -> None:
    response = shared.openai.chat.completions.create(model="demo", messages=cast(Any, CHAT))
    assert response.usage is not None
    assert response.usage.total_tokens == MAX_LEN
    completion = shared.openai.completions.create(model="demo", prompt=PROMPT)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16, "OpenAI's default for completions"


def test_text_parts_and_developer_role(shared: Running, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = [{"role": "developer", "content": parts}, {"role": "assistant", "content": "x", "refusal": None}, *CHAT]
    shared.openai.chat.completions.create(model="demo", messages=cast(Any, request), max_tokens=1)
    plain = [{"role": "system", "content": "one\ntwo"}, {"role": "assistant", "content": "x"}, *CHAT]
    assert fake(shared).asked[-1][0] == tokenizer.encode_chat(plain)


def test_sampling_parameters_reach_the_engine(shared: Running) -> None:
    request: dict[str, Any] = {
        "n": 2, "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"5": 1.5}, "max_tokens": 4, "min_tokens": 2,
        "stop": ["a", "b"], "stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True,
        "logprobs": 3, "seed": -9, "skip_special_tokens": False, "allowed_token_ids": [3, 4, 5], "bad_words": ["x"],
        "prompt_logprobs": 2,
    }  # fmt: skip
    assert shared.post("/v1/completions", {"prompt": PROMPT, "user": "me", **request}).status_code == 200
    assert fake(shared).asked[-1][1] == SamplingParams(**request | {"logit_bias": {5: 1.5}})
    here = {*request, "structured_outputs", "logprob_token_ids"}
    assert here == set(SamplingParams.__struct_fields__), "what can be request offline can be request here"
    assert shared.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}).status_code == 200
    assert fake(shared).asked[-1][1] == SamplingParams(temperature=0.7, max_tokens=3), "the model's recommendation"


STRUCTURED = {  # fields of a request, and the arguments for StructuredOutputsParams
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


@pytest.mark.parametrize(("fields", "arguments"), STRUCTURED.values(), ids=STRUCTURED)
def test_structured_output_fields_reach_the_engine(
    shared: Running, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    for route, body in (("completions", COMPLETION), ("chat/completions", CHAT_BODY)):
        response = shared.post(f"/v1/{route}", {**body, **fields})
        assert response.status_code == 200, response.text
        assert fake(shared).asked[-1][1].structured_outputs == StructuredOutputsParams(**arguments)


NEUTRAL = {
    "tool_choice": "none", "tools": None, "response_format": {"type": "text"}, "modalities": ["text"],
    "verbosity": "medium",
    "store": False, "service_tier": "auto", "parallel_tool_calls": True, "logit_bias": None, "stop": None,
    "temperature": None, "stream": False, "stream_options": None, "reasoning_effort": None,
}  # fmt: skip


def test_neutral_values_are_accepted(shared: Running) -> None:
    response = shared.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, **NEUTRAL})
    assert response.status_code == 200, response.text


def test_models_and_version(shared: Running) -> None:
    (model,) = shared.openai.models.list().data
    assert (model.id, model.owned_by) == ("demo", "lockstep")
    expected = {"root": "demo", "parent": None, "max_model_len": MAX_LEN}
    assert expected.items() <= (model.model_extra or {}).items()
    assert shared.http.get("/version").json()["version"]


def test_tokenize_and_detokenize(shared: Running, tokenizer: Tokenizer) -> None:
    response = shared.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert response["tokens"] == tokenizer.encode(PROMPT)
    assert (response["count"], response["max_model_len"]) == (len(response["tokens"]), MAX_LEN)
    assert "".join(response["token_strs"]) == "<|bos|>" + PROMPT.replace(" ", "Ġ"), "the names of the vocabulary"
    assert shared.post("/detokenize", {"tokens": response["tokens"]}).json() == {"prompt": "<|bos|>" + PROMPT}
    assert shared.post("/tokenize", {"messages": CHAT}).json()["tokens"] == tokenizer.encode_chat(CHAT)


def test_served_model_names(run: Callable[..., Running]) -> None:
    running = run(served_model_name=["big", "small"])
    assert [m.id for m in running.openai.models.list()] == ["big", "small"]
    assert running.openai.completions.create(model="small", prompt="a", max_tokens=1).model == "small"
    with pytest.raises(openai.NotFoundError):
        running.openai.completions.create(model="demo", prompt="a")


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "other"}, openai.NotFoundError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
    ],
)
def test_errors_raise_openai_exceptions(
    shared: Running, fields: dict[str, Any], kind: type[openai.APIStatusError]
) -> None:
    with pytest.raises(kind) as caught:
        shared.openai.chat.completions.create(**({"model": "demo", "messages": CHAT} | fields))
    assert caught.value.param == next(iter(fields)) or caught.value.code == "context_length_exceeded"
    assert caught.value.type == "invalid_request_error"
