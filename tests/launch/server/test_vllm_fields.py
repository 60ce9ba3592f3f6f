"""vLLM's fields over a real engine, each compared with answers that do not use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, COMPLETION, PROMPT, Running, demo_server, error_of

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
ROUTES = [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": CHAT})]


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with demo_server(served_model_name=["demo"]) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


def answer(real: Running, route: str, **body: Any) -> Any:
    response = real.post(route, GREEDY | body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(real: Running, route: str, **body: Any) -> list[Any]:
    lines = real.post(route, GREEDY | body | {"stream": True}).text.split("\n\n")
    return [httpx.Response(200, text=line[6:]).json() for line in lines if line.startswith("data: {")]


def text_of(choice: Any) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize(("route", "prompt"), ROUTES)
def test_return_token_ids(real: Running, tokenizer: Tokenizer, route: str, prompt: dict[str, Any]) -> None:
    plain = answer(real, route, **prompt, n=2)
    whole = answer(real, route, **prompt, n=2, return_token_ids=True)
    expected = tokenizer.encode(PROMPT) if "prompt" in prompt else tokenizer.encode_chat(CHAT)
    prompts = [c["prompt_token_ids"] for c in whole["choices"]] if "prompt" in prompt else [whole["prompt_token_ids"]]
    assert all(ids == expected for ids in prompts)
    for choice, other in zip(whole["choices"], plain["choices"], strict=True):
        assert text_of(choice) == text_of(other)
        assert len(choice["token_ids"]) == 12
        assert tokenizer.decode(choice["token_ids"]).strip() == text_of(choice).strip()
        assert other["token_ids"] is None
    parts = chunks(real, route, **prompt, n=2, return_token_ids=True)
    streamed: list[list[int]] = [[], []]
    for part in parts:
        for choice in part["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    assert streamed == [choice["token_ids"] for choice in whole["choices"]]
    if "prompt" in prompt:
        assert [c["prompt_token_ids"] for part in parts for c in part["choices"] if "prompt_token_ids" in c] == prompts
    else:
        assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == prompts
        assert "prompt_token_ids" in parts[0]
    assert not any("token_ids" in line for line in map(str, chunks(real, route, **prompt)))


def test_return_tokens_as_token_ids(real: Running) -> None:
    fields = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = answer(real, "/v1/completions", prompt=PROMPT, echo=True, logprobs=2, **fields)["choices"]
    names = [f"token_id:{i}" for i in choice["prompt_token_ids"] + choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    for name, top in zip(names[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert next(iter(top)) == name
        assert all(key.startswith("token_id:") for key in top)
    (choice,) = answer(real, "/v1/chat/completions", messages=CHAT, logprobs=True, top_logprobs=2, **fields)["choices"]
    assert [t["token"] for t in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]
    assert all(c["token"].startswith("token_id:") for t in choice["logprobs"]["content"] for c in t["top_logprobs"])


@pytest.mark.parametrize(("route", "prompt"), ROUTES)
def test_prompt_logprobs(real: Running, tokenizer: Tokenizer, route: str, prompt: dict[str, Any]) -> None:
    whole = answer(real, route, **prompt, prompt_logprobs=2, return_token_ids=True)
    choice = whole["choices"][0]
    ids, positions = (choice if "prompt" in prompt else whole)["prompt_token_ids"], None
    positions = (choice if "prompt" in prompt else whole)["prompt_logprobs"]
    assert positions[0] is None
    assert len(positions) == len(ids)
    echo = answer(real, "/v1/completions", prompt=ids, echo=True, logprobs=2)["choices"][0]["logprobs"]
    for position in range(1, len(ids)):
        entry = positions[position]
        own = entry[str(ids[position])]
        assert own["logprob"] == pytest.approx(echo["token_logprobs"][position], abs=1e-4)
        assert {c["rank"] for c in entry.values()} >= {1, 2}
        assert len(entry) == (2 if own["rank"] <= 2 else 3)
        assert own["decoded_token"] == tokenizer.token_bytes.text(ids[position])
    assert text_of(choice) == text_of(answer(real, route, **prompt)["choices"][0])


def test_prompt_logprobs_and_echo_each_have_their_width(real: Running) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    (choice,) = answer(real, "/v1/completions", **body)["choices"]
    (narrow,) = answer(real, "/v1/completions", **body | {"prompt_logprobs": 0})["choices"]
    assert all(len(entry) >= 3 for entry in choice["prompt_logprobs"][1:])
    assert all(len(entry) == 1 for entry in narrow["prompt_logprobs"][1:])
    (alone,) = answer(real, "/v1/completions", prompt=PROMPT, echo=True, logprobs=1)["choices"]
    assert choice["logprobs"] == narrow["logprobs"] == alone["logprobs"]


@pytest.mark.parametrize(("route", "prompt"), ROUTES)
def test_allowed_tokens_and_bad_words(real: Running, tokenizer: Tokenizer, route: str, prompt: dict[str, Any]) -> None:
    free = answer(real, route, **prompt, return_token_ids=True)["choices"][0]["token_ids"]
    allowed = [free[0], free[3], 77]
    (choice,) = answer(real, route, **prompt, allowed_token_ids=allowed, return_token_ids=True)["choices"]
    assert set(choice["token_ids"]) <= set(allowed)
    word = tokenizer.decode(free[1:3])
    (choice,) = answer(real, route, **prompt, bad_words=[word], return_token_ids=True)["choices"]
    assert choice["token_ids"][:2] == free[:2], "the word is complete with its last token"
    for sequence in tokenizer.encode_words([word]):
        n = len(sequence)
        assert sequence not in [choice["token_ids"][i : i + n] for i in range(12)]


def test_logprob_token_ids(real: Running) -> None:
    ids = [5, 900, 3]
    plain = answer(real, "/v1/completions", prompt=PROMPT, logprobs=1)["choices"][0]
    (choice,) = answer(
        real, "/v1/completions", prompt=PROMPT, logprobs=1, logprob_token_ids=ids, return_tokens_as_token_ids=True
    )["choices"]
    assert choice["text"] == plain["text"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-4)
    for top, name in zip(choice["logprobs"]["top_logprobs"], choice["logprobs"]["tokens"], strict=True):
        assert top.keys() == {name, *(f"token_id:{i}" for i in ids)}
    (choice,) = answer(
        real, "/v1/chat/completions", messages=CHAT, logprobs=True, logprob_token_ids=ids,
        return_tokens_as_token_ids=True,
    )["choices"]  # fmt: skip
    for entry in choice["logprobs"]["content"]:
        top = [candidate["token"] for candidate in entry["top_logprobs"]]
        assert set(top) == {entry["token"], *(f"token_id:{i}" for i in ids)}
        values = [candidate["logprob"] for candidate in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_max_tokens_of_zero_with_echo(real: Running, logprobs: int | None) -> None:
    body = {"prompt": [PROMPT, "Blessed are"], "echo": True, "logprobs": logprobs}
    whole = answer(real, "/v1/completions", **body, max_tokens=0, return_token_ids=True)
    longer = answer(real, "/v1/completions", **body, max_tokens=3)
    assert [choice["text"] for choice in whole["choices"]] == body["prompt"]
    assert whole["usage"]["completion_tokens"] == 0
    for choice, other in zip(whole["choices"], longer["choices"], strict=True):
        assert choice["finish_reason"] == "length"
        assert choice["token_ids"] == []
        if logprobs is not None:
            number = len(choice["prompt_token_ids"])
            expected = {name: values[:number] for name, values in other["logprobs"].items()}
            assert choice["logprobs"]["tokens"] == expected["tokens"]
            assert choice["logprobs"]["text_offset"] == expected["text_offset"]
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected["token_logprobs"][1:], abs=1e-4)
    parts = chunks(real, "/v1/completions", prompt=PROMPT, echo=True, max_tokens=0)
    assert [(c["text"], c["finish_reason"]) for part in parts for c in part["choices"]] == [(PROMPT, "length")]


@pytest.mark.parametrize(("side", "kept"), [(None, slice(-4, None)), ("left", slice(-4, None)), ("right", slice(4))])
@pytest.mark.parametrize(("route", "prompt"), ROUTES)
def test_truncate_prompt_tokens(
    real: Running, route: str, prompt: dict[str, Any], side: str | None, kept: slice
) -> None:
    fields = {"return_token_ids": True, "truncate_prompt_tokens": 4, "truncation_side": side}
    whole = answer(real, route, **prompt, return_token_ids=True)
    cut = answer(real, route, **prompt, **fields)
    holders = [reply if "messages" in prompt else reply["choices"][0] for reply in (whole, cut)]
    ids = holders[0]["prompt_token_ids"]
    assert holders[1]["prompt_token_ids"] == ids[kept]
    same = answer(real, "/v1/completions", prompt=ids[kept], return_token_ids=True)["choices"][0]
    assert cut["choices"][0]["token_ids"] == same["token_ids"]
    assert cut["usage"]["prompt_tokens"] == 4


def test_prompt_that_is_too_long_is_truncated(real: Running, tokenizer: Tokenizer) -> None:
    text = PROMPT * 400
    assert error_of(real.post("/v1/completions", {"prompt": text}))["code"] == "context_length_exceeded"
    limit = real.http.get("/v1/models").json()["data"][0]["max_model_len"]
    body = {"prompt": text, "truncate_prompt_tokens": -1, "max_tokens": 1, "echo": True}
    reply = answer(real, "/v1/completions", **body, return_token_ids=True)
    (choice,) = reply["choices"]
    assert choice["prompt_token_ids"] == tokenizer.encode(text)[-(limit - 1) :]
    assert choice["text"].startswith(tokenizer.decode(choice["prompt_token_ids"])), "the echo is what was kept"


@pytest.mark.parametrize("special", [False, True])
def test_add_special_tokens(real: Running, tokenizer: Tokenizer, special: bool) -> None:
    (choice,) = answer(
        real, "/v1/completions", prompt=PROMPT, add_special_tokens=special, return_token_ids=True
    )["choices"]  # fmt: skip
    assert choice["prompt_token_ids"] == tokenizer.encode(PROMPT, add_special_tokens=special)
    tokens = real.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": special}).json()["tokens"]
    assert tokens == choice["prompt_token_ids"]
    chat = answer(real, "/v1/chat/completions", messages=CHAT, add_special_tokens=special, return_token_ids=True)
    tokens = real.post("/tokenize", {"messages": CHAT, "add_special_tokens": special}).json()["tokens"]
    assert tokens == chat["prompt_token_ids"]
    plain = tokenizer.encode_chat(CHAT)
    added = len(tokenizer.encode("x")) - len(tokenizer.encode("x", add_special_tokens=False))
    assert len(tokens) == len(plain) + added * special


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_cache_salt(real: Running, route: str) -> None:
    text = f"{route}: " + PROMPT * 4
    prompt: dict[str, Any] = {
        "/v1/completions": {"prompt": text}, "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/responses": {"input": text},
    }[route]  # fmt: skip
    cached = []
    for salt in (None, "a", "b", "a", None):
        limit = {"max_output_tokens" if "input" in prompt else "max_tokens": 2}
        body = prompt | limit | ({} if salt is None else {"cache_salt": salt})
        usage = real.post(route, body | {"temperature": 0}).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        cached.append(details["cached_tokens"] > 0)
    # The beginning of chats is cached by the tests before.
    assert cached[1:] == [False, False, True, True]


def test_log_probabilities_of_responses(real: Running) -> None:
    body: dict[str, Any] = {"model": "demo", "input": "Who was Moses?", "max_output_tokens": 9, "temperature": 0}
    chat = real.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": body["input"]}], max_tokens=9, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    assert chat.choices[0].logprobs is not None
    expected = chat.choices[0].logprobs.content or []
    wanted = body | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (item,) = real.openai.responses.create(**wanted).output
    assert item.type == "message"
    (part,) = item.content
    assert part.type == "output_text"
    assert [(e.token, e.bytes) for e in part.logprobs or ()] == [(e.token, e.bytes) for e in expected]
    for entry, other in zip(part.logprobs or (), expected, strict=True):
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [c.token for c in entry.top_logprobs] == [c.token for c in other.top_logprobs]
    streamed = []
    with real.openai.responses.stream(**wanted) as events:
        for event in events:
            if event.type == "response.output_text.delta":
                streamed += [entry.token for entry in event.logprobs]
            if event.type == "response.output_text.done":
                assert [entry.token for entry in event.logprobs] == streamed
    assert streamed == [e.token for e in expected]
    plain = real.openai.responses.create(**body).output[0]
    assert plain.type == "message"
    assert plain.content[0].model_dump()["logprobs"] == []
    assert error_of(real.post("/v1/responses", body | {"top_logprobs": 2}))["param"] == "top_logprobs"


def test_tokenizer_info(real: Running) -> None:
    info = real.http.get("/tokenizer_info").json()
    config = json.loads((Path(DEMO_MODEL) / "tokenizer_config.json").read_text())
    assert info["chat_template"] == Tokenizer(Path(DEMO_MODEL)).chat_template
    assert info["tokenizer_class"]
    assert {name: info[name] for name in ("bos_token", "eos_token") if name in config} == {
        name: config[name] for name in ("bos_token", "eos_token") if name in config
    }
    assert str(Path(DEMO_MODEL).parent) not in json.dumps(info)


def test_option_of_the_server_names_tokens_by_id(run: Callable[..., Running]) -> None:
    running = run(return_tokens_as_token_ids=True)
    body = COMPLETION | {"logprobs": 1}
    tokens = running.post("/v1/completions", body).json()["choices"][0]["logprobs"]["tokens"]
    assert all(token.startswith("token_id:") for token in tokens)
    body["return_tokens_as_token_ids"] = False
    tokens = running.post("/v1/completions", body).json()["choices"][0]["logprobs"]["tokens"]
    assert not any(token.startswith("token_id:") for token in tokens)
