"""Requests that the server refuses: status, envelope, field and code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fake_engine import CHAT, CHAT_BODY, COMPLETION, MAX_LEN, Running, error_of, fake


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


GONE = ...  # a value that leaves the field out
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
    ("chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ("chat/completions", {"messages": [*CHAT, {"role": "user", "content": None}]}, "messages[1].content",
        "missing_required_parameter"),
    ("chat/completions", {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages[0].content", None),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages[0]",
        "invalid_value"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x", "reasoning": "y"}]}, "messages[0]",
        "invalid_value"),
    ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]},
        "messages[0].tool_calls[0].function.arguments", "missing_required_parameter"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "annotations": [1]}]},
        "messages[0].annotations", "unsupported_parameter"),
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
    ("completions", {"max_tokens": 0}, "max_tokens", "invalid_value"),
    ("completions", {"max_tokens": 0, "echo": True, "logprobs": 1, "logprob_token_ids": [5]}, "max_tokens",
        "invalid_value"),
    ("chat/completions", {"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ("completions", {"allowed_token_ids": []}, "allowed_token_ids", None),
    ("completions", {"allowed_token_ids": [2048]}, "allowed_token_ids", "invalid_value"),
    ("completions", {"allowed_token_ids": [5], "structured_outputs": {"regex": "a"}}, "allowed_token_ids",
        "invalid_value"),
    ("completions", {"bad_words": [""]}, "bad_words[0]", "invalid_value"),
    ("completions", {"bad_words": [" "]}, "bad_words", "invalid_value"),
    ("completions", {"bad_words": ["a"] * 129}, "bad_words", "invalid_value"),
    ("completions", {"bad_words": ["a" * 3000] * 2}, "bad_words", "invalid_value"),
    ("completions", {"logprob_token_ids": [5]}, "logprob_token_ids", "invalid_value"),
    ("completions", {"logprobs": 1, "logprob_token_ids": [2048]}, "logprob_token_ids", "invalid_value"),
    ("chat/completions", {"logprob_token_ids": [5]}, "logprob_token_ids", "invalid_value"),
    ("completions", {"prompt_logprobs": 21}, "prompt_logprobs", "integer_above_max_value"),
    ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
    ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", None),
    ("completions", {"truncate_prompt_tokens": MAX_LEN}, "truncate_prompt_tokens", "invalid_value"),
    ("completions", {"truncation_side": "left"}, "truncation_side", "invalid_value"),
    ("completions", {"priority": 1}, "priority", "invalid_value"),
    ("completions", {"priority": 2**63}, "priority", "integer_above_max_value"),
    ("completions", {"cache_salt": ""}, "cache_salt", "invalid_value"),
    ("completions", {"cache_salt": "x" * 1025}, "cache_salt", "invalid_value"),
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
    *(
        ("completions", {"logit_bias": {key: 1}}, "logit_bias", None)
        for key in ("05", " 5", "5 ", "+5", "5_0", "５", "5.0", "", "5\n", "00", "0x5", "99999999999")
    ),
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
        "functions": [], "function_call": "auto",
        "guided_decoding_backend": "x", "guided_whitespace_pattern": " ", "audio": {"voice": "x"},
        "modalities": ["text", "audio"], "verbosity": "low", "chat_template": "{{ 1 }}",
        "use_beam_search": True,
        "best_of": 2, "store": True, "prediction": {}, "documents": [],
    }.items()],
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ("chat/completions", {"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ("chat/completions", {"tools": [tool("a b")]}, "tools[0].function.name", None),
    ("chat/completions", {"tools": [tool("a"), tool("a")]}, "tools", "invalid_value"),
    ("chat/completions", {"tools": [tool("a", {"type": "array"})]}, "tools[0].function.parameters", "invalid_value"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ("chat/completions", {"tool_choice": "any", "tools": [tool("a")]}, "tool_choice", None),
    ("chat/completions", {"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [tool("a")]},
        "tool_choice", "invalid_value"),
    ("chat/completions", {"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ("chat/completions", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "invalid_value"),
    ("chat/completions", {"chat_template_kwargs": {"a": "x" * 70_000}}, "chat_template_kwargs", "invalid_value"),
    ("chat/completions", {"chat_template_kwargs": [1]}, "chat_template_kwargs", "invalid_type"),
    ("chat/completions", {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message",
        "invalid_value"),
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
    num_requests = len(fake(shared).asked)
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
    assert len(fake(shared).asked) == num_requests, "nothing may have been started"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], "x" * 2000, ["a"] * 17, [1], 5, {}])
def test_wrong_stop_names_the_limit_of_the_server(shared: Running, stop: Any) -> None:
    message = error_of(shared.post("/v1/completions", {**COMPLETION, "stop": stop}))["message"]
    assert "at most --max-stop-strings (default 4)" in message


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
def test_other_content_types_are_refused(shared: Running, kind: str) -> None:
    content = json.dumps(COMPLETION).encode()
    response = shared.http.post("/v1/completions", content=content, headers={"content-type": kind} if kind else {})
    assert response.status_code == 400
    assert "content-type" in error_of(response)["message"]


def test_unknown_routes_and_methods(shared: Running) -> None:
    for path in ("/v2", "/v1/nothing", "/docs", "/v1/embeddings"):
        response = shared.http.get(path)
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    response = shared.http.get("/v1/models/")  # a model without a name
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    response = shared.http.get("/v1/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    assert shared.http.delete("/v1/models").status_code == 405


def test_error_responses_are_bounded(shared: Running) -> None:
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


def test_tokenize_refusals(shared: Running) -> None:
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": CHAT}), ("/detokenize", {"tokens": [5000]}),
        ("/detokenize", {"tokens": ["a"]}), ("/tokenize", {"prompt": "a", "add_special_tokens": 1}),
    ):  # fmt: skip
        response = shared.post(path, body)
        assert response.status_code == 400
        assert error_of(response)["param"] in ("prompt", "tokens", "tokens[0]", "add_special_tokens")


def test_bad_requests_do_not_change_later_answers(shared: Running) -> None:
    golden = {**COMPLETION, "seed": 3, "n": 2, "logprobs": 2}

    def answer() -> Any:
        completion = shared.post("/v1/completions", golden).json()
        return {k: v for k, v in completion.items() if k not in ("id", "created")}

    before = answer()
    for i in range(2000):
        route, changes, _, _ = BAD[i % len(BAD)]
        body = {**(COMPLETION if route == "completions" else CHAT_BODY), **changes}
        content = json.dumps({k: v for k, v in body.items() if v is not GONE})
        response = shared.http.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404)
    assert json.dumps(answer()) == json.dumps(before)
    assert fake(shared).live == 0
