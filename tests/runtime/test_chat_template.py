"""Prompts and conversations become the same token ids as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{% for m in messages %}<|user|>{% if 'content' in m %}{{ m.content }}{% else %}none{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ style }}"
)
CHAT = [{"role": "user", "content": "Who was Moses?"}, {"role": "assistant", "content": "A man of "}]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's tokenizer with other templates, and a truncation that prompts do not have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(Path(DEMO_MODEL) / name, folder)
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "with tools: " + TEMPLATE}
    ]  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_prompts_equal_transformers(folder: Path) -> None:
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in ("", "a", "In the beginning", "<|user|> x <|eos|>", "\u00e9\U0001f600\x00\n\n  ", "word " * 500):
        assert tokenizer.encode(text) == expected.encode(text)


@pytest.mark.parametrize(
    "variables",
    [
        {}, {"add_generation_prompt": False}, {"style": "plain"}, {"tools": TOOLS}, {"documents": [{"text": "Exodus"}]},
        {"continue_final_message": True}, {"chat_template": "{{ messages[0].content }}"}, {"bos_token": "x"},
    ],
)  # fmt: skip
def test_conversations_equal_transformers(folder: Path, variables: dict[str, Any]) -> None:
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    messages = [*CHAT[:1], {"role": "assistant", "content": "x", "tool_calls": None}, *CHAT]
    options = {"add_generation_prompt": "continue_final_message" not in variables, **variables}
    text = expected.apply_chat_template(messages, tokenize=False, **options)
    assert tokenizer.encode_chat(messages, variables) == expected.encode(text, add_special_tokens=False)


def test_keys_without_a_value_are_left_out(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    without = tokenizer.encode_chat([{"role": "user"}])
    assert tokenizer.encode_chat([{"role": "user", "content": None}]) == without
    assert "none" in tokenizer.decode(without)
