"""Requests that would cost the event loop much: refused at once with the reason, or made in pieces beside it."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from lockstep.launch.server import body_structure, http_io, reply_builders
from lockstep.launch.server.api_errors import ApiError
from lockstep.launch.server.body_structure import check_structure, count_all, count_outside_strings
from lockstep.launch.server.http_io import BodyBudget

from fake_engine import CHAT, CHAT_BODY, COMPLETION, MAX_LEN, Running, error_of, expected_text, fake

USER = {"role": "user", "content": ""}
WORDS = ["a", "", '"', "\\", '\\"', "[", "]", "{", "}", ",", ":", "\n", "é", '{"a": ["b", 1]}', "\\\\"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 4 else 4)
    if kind < 2:
        return "".join(rng.choices(WORDS, k=rng.randrange(5)))
    if kind < 4:
        return rng.choice([1, -2.5, None, True])
    values = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == 4 else {str(i) + rng.choice(WORDS): value for i, value in enumerate(values)}


def count(value: Any) -> tuple[int, int]:
    """Return the numbers of objects, lists and strings, and of commas between entries."""
    if isinstance(value, str):
        return 1, 0
    if not isinstance(value, (list, dict)):
        return 0, 0
    inner = [count(entry) for entry in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return 1 + keys + sum(parts for parts, _ in inner), max(0, len(value) - 1) + sum(commas for _, commas in inner)


def test_counts_equal_those_of_the_parsed_value() -> None:
    rng = random.Random(5)
    for number in range(500):
        content = json.dumps(random_value(rng), ensure_ascii=number % 2 == 0).encode()
        parts, commas = count(json.loads(content))
        assert count_outside_strings(content) == (parts, commas + 1), content
        bounds = count_all(content)
        assert bounds[0] >= parts, content
        assert bounds[1] >= commas + 1, content


@pytest.mark.parametrize(
    "content", [b"", b"[", b'"', b'\\"', b'{"a', b'["a\\', b'["\\\\"]', b'[[["', b"\xff\xfe,,,", b'"""""']
)
def test_content_that_is_not_json_can_be_counted(content: bytes) -> None:
    check_structure(content)
    parts, items = count_outside_strings(content)
    assert parts <= len(content)
    assert items <= len(content) + 1


def test_limits_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_structure, "MAX_PARTS", 7)
    check_structure(b'{"a": ["b", "[[[[,,,,", {}]}')  # 3 containers and 3 strings
    check_structure(b'{"a": ["b", "[[[[,,,,", {}, {}]}')
    with pytest.raises(ApiError, match="the body has 8 objects, lists and strings, but a request takes at most 7"):
        check_structure(b'{"a": ["b", "[[[[,,,,", {}, {}, []]}')
    check_structure(b"[1, 2, 3]", max_items=3)
    with pytest.raises(ApiError, match="the body has 4 list entries, but a request takes at most 3; send less"):
        check_structure(b"[1, 2, 3, 4]", max_items=3)


LETTERS = "a" * 600_000
TOO_MUCH: list[tuple[str, dict[str, Any], str | None, str]] = [  # route, body, param, code
    ("/v1/completions", {"prompt": LETTERS}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ["a", LETTERS]}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ["In the beginning " * 300] * 20}, "prompt", "context_length_exceeded"),
    ("/v1/completions", {"prompt": ["a" * 400] * 1000}, "prompt", "array_above_max_length"),
    ("/v1/completions", {"prompt": ["a"] * 100_000}, None, "too_complex"),
    ("/v1/completions", {"prompt": [1] * 600_000}, None, "too_complex"),
    ("/v1/completions", {"prompt": [[1]] * 60_000}, None, "too_complex"),
    ("/v1/chat/completions", {"messages": [USER | {"content": LETTERS}]}, "messages", "context_length_exceeded"),
    ("/v1/chat/completions", {"messages": [USER] * 20_000}, None, "too_complex"),
    ("/tokenize", {"messages": [USER] * 20_000}, None, "too_complex"),
    ("/detokenize", {"tokens": [5] * 600_000}, None, "too_complex"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 1 for i in range(60_000)}}, None, "too_complex"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(i): 900 for i in range(5000)}}, "logit_bias",
        "invalid_value"),
    ("/v1/completions", {"prompt": "a", "x": [[[]]] * 30_000}, None, "too_complex"),
    ("/v1/completions", {"prompt": "a", "guided_json": {str(i): {} for i in range(30_000)}}, None, "too_complex"),
    ("/v1/completions", {"prompt": [[5] * 400] * 100, "echo": True, "logprobs": 20}, "echo", "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "param", "code"), TOO_MUCH)
def test_too_much_is_refused_with_the_reason(
    shared: Running, route: str, body: dict[str, Any], param: str | None, code: str
) -> None:
    response = shared.post(route, body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert "at most" in error["message"] or "expected" in error["message"]


def test_longest_prompts_are_taken(shared: Running) -> None:
    """The longest token has 14 characters, and a prompt of these has 14 for each token of the context."""
    ids = [max(range(4, 2048), key=lambda i: len(fake(shared).tokenizer.source.decode([i])))] * (MAX_LEN - 2)
    text = fake(shared).tokenizer.source.decode(ids)
    assert len(text) > 10 * MAX_LEN
    response = shared.post("/v1/completions", {"prompt": text, "max_tokens": 1})
    assert response.status_code == 200
    assert fake(shared).asked[-1][0][1:] == ids


def test_busy_tokenizer_is_429(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    running, release = run(), threading.Event()
    tokenizer = fake(running).tokenizer.source
    monkeypatch.setattr("lockstep.launch.engine.async_tokenizer.WAIT_S", 0.05)
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: [5] if release.wait(60) else [])
    response = running.post("/v1/completions", COMPLETION)
    release.set()
    assert (response.status_code, error_of(response)["code"]) == (429, "rate_limit_exceeded")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' * 10 ** 10 }}", "{{ f() }}"])
def test_template_that_fails_is_400(shared: Running, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    tokenizer = fake(shared).tokenizer.source
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    for path, body in (("/v1/chat/completions", CHAT_BODY), ("/tokenize", {"messages": CHAT})):
        response = shared.post(path, body)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "messages")
        assert "the chat template does not accept these messages: " in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/completions",
            COMPLETION | {"prompt": ["Blessed", "In the"], "n": 2, "echo": True, "logprobs": 3, "seed": 4},
        ),
        ("/v1/completions", COMPLETION | {"model": "demo"}),
        ("/v1/chat/completions", CHAT_BODY | {"n": 3, "logprobs": True, "top_logprobs": 2, "seed": 4}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_the_thread_equal_those_of_the_loop(
    shared: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], stream: bool
) -> None:
    first = answer_of(shared, path, body | {"stream": stream})
    monkeypatch.setattr(reply_builders, "LONG_CANDIDATES", -1)
    assert answer_of(shared, path, body | {"stream": stream}) == first
    assert all(len(part["choices"]) == (len(first[0]["choices"]) if not stream else 1) for part in first)


def answer_of(running: Running, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of an answer in the order of their choices, without what differs between two requests."""
    response = running.post(path, body)
    assert response.status_code == 200
    lines = response.text.split("\n\n")
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    for part in parts:
        assert part.pop("id")
        assert part.pop("created")
    return sorted(parts, key=lambda part: int(part["choices"][0]["index"]))


def test_long_bodies_arrive_at_one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, started = BodyBudget(1000, 4), time.monotonic()
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(http_io.asyncio, "sleep", sleep)

    async def main() -> None:
        await asyncio.gather(*(budget.wait_for_turn(500) for _ in range(2 * http_io.LONG_BODIES_PER_S)))

    asyncio.run(main())
    elapsed = time.monotonic() - started
    assert waits == sorted(waits)
    assert 1 - elapsed <= waits[-1] <= 1, "8 bodies of the maximum length take a second"


def test_tokens_of_a_long_text_come_back(shared: Running) -> None:
    text = "In the beginning God created the heaven and the earth. " * 2000
    tokens = shared.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert "".join(tokens["token_strs"][1:]).replace("Ġ", " ") == text
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert shared.post("/detokenize", {"tokens": tokens["tokens"][1:]}).json() == {"prompt": text}
    assert shared.post("/v1/completions", COMPLETION).json()["choices"][0]["text"] == expected_text(
        fake(shared).tokenizer.source, fake(shared).asked[-1][0], 4
    )
