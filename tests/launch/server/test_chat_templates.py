"""The fields and options that decide how a conversation becomes a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.server.server_config import ServerConfig
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import CHAT, FakeService, Running, error_of, fake

SHOWS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }} {{ reasoning_effort }}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}!{% endif %}"
    "{% endif %}"
)
CONTINUED = [*CHAT, {"role": "assistant", "content": "In the"}]


@pytest.fixture
def shows() -> Iterator[Running]:
    tokenizer = Tokenizer(Path(DEMO_MODEL), SHOWS)
    running = Running(FakeService(tokenizer), default_chat_template_kwargs='{"mood": "calm"}')
    yield running
    running.close()


def prompt(running: Running, **fields: Any) -> str:
    response = running.post("/v1/chat/completions", {"messages": CHAT, "max_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    return str(fake(running)._sync.decode(fake(running).asked[-1][0], skip_special_tokens=False))


def test_variables_of_the_template(shows: Running) -> None:
    question = "[user]Who was Moses?"
    for fields, expected in (
        ({}, "calm [assistant]"),
        ({"chat_template_kwargs": {"mood": "wild"}}, "wild [assistant]"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "calm [assistant]!"),
        ({"chat_template_kwargs": {"unused": [1, {"a": None}]}}, "calm [assistant]"),
        ({"reasoning_effort": "high"}, "calm high[assistant]"),
        ({"reasoning_effort": "none"}, "calm none[assistant]!"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": 5}}, "calm 5[assistant]"),
        ({"add_generation_prompt": False}, "calm "),
    ):  # fmt: skip
        assert prompt(shows, **fields) == question + expected, fields


def test_continued_message(shared: Running, tokenizer: Tokenizer) -> None:
    whole = prompt(shared, messages=CONTINUED, continue_final_message=True)
    assert whole.endswith("<|assistant|>In the")
    body = {"messages": CONTINUED, "continue_final_message": True, "echo": True, "max_tokens": 3, "stream": True}
    texts = [
        json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        for line in shared.post("/v1/chat/completions", body).text.splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(texts).startswith("In the")
    whole = shared.post("/v1/chat/completions", body | {"stream": False}).json()["choices"][0]["message"]["content"]
    assert whole == "".join(texts)


def test_tokenize_renders_as_chats_do(shows: Running) -> None:
    fields = {"messages": CHAT, "chat_template_kwargs": {"mood": "wild"}, "add_generation_prompt": False}
    tokens = shows.post("/tokenize", fields).json()["tokens"]
    prompt(shows, **fields)
    assert tokens == fake(shows).asked[-1][0]


def test_template_that_fails_names_the_messages(run: Callable[..., Running]) -> None:
    tokenizer = Tokenizer(Path(DEMO_MODEL), "{{ raise_exception('no kings') }}")
    running = Running(FakeService(tokenizer))
    try:
        error = error_of(running.post("/v1/chat/completions", {"messages": CHAT}))
    finally:
        running.close()
    assert error["param"] == "messages"
    assert "no kings" in error["message"]


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="the chat template is not valid Jinja: line 1"):
        Tokenizer(Path(DEMO_MODEL), "{% if %}")
    for text in ("[1]", "{", "5"):
        with pytest.raises(ValueError, match="default_chat_template_kwargs"):
            ServerConfig(default_chat_template_kwargs=text)
