"""Text to token ids and back: the checkpoint's tokenizer and chat template, and incremental detokenization."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..comm.message_text import first_line
from .request import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_PARTIAL = 8  # tokens that may be parts of one character; more of them are invalid UTF-8
PROMPT_CONTEXT_TOKENS = 6  # tokens of the prompt that determine the spacing of the first output tokens

Message = dict[str, Any]


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`; raises ValueError if transformers cannot load it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # takes 1-2 s: only for processes that tokenize

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no usable tokenizer in {folder}: {first_line(error)}") from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer in {folder} has no fast version; convert it to tokenizer.json")
        self.decode_ids: Callable[..., str] = backend.decode

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the tokenizer adds."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation in the chat template, up to the assistant's answer."""
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template; use generate with a prompt instead of chat")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template does not accept these messages: {error}") from error
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of these ids alone."""
        return self.decode_ids(list(ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """The text of one output as its tokens come, in whole characters.

    Decodes a window twice, without and with the new tokens, and returns the difference: the spacing between tokens is
    then the same as in the whole text (the two-offset method of text-generation-inference).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer.decode_ids
        self._skip = skip_special_tokens
        self._ids = [int(i) for i in prompt[-PROMPT_CONTEXT_TOKENS:]]
        self._window = 0  # start of the tokens to decode
        self._emitted = len(self._ids)  # end of the tokens that were returned as text

    def push(self, token: int) -> str:
        """Return the text that is certain with this token; may be empty."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._emitted > LONGEST_PARTIAL)

    def flush(self) -> str:
        """Return the rest of the text; bytes of an incomplete character become replacement characters."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._window : self._emitted], skip_special_tokens=self._skip)
        now = self._decode(self._ids[self._window :], skip_special_tokens=self._skip)
        if now.endswith(REPLACEMENT) and not final:
            return ""
        self._window, self._emitted = self._emitted, len(self._ids)
        return now[len(before) :]


def default_sampling_params(folder: Path) -> SamplingParams:
    """Return the recommendation in the checkpoint's generation_config.json; the defaults without one."""
    try:
        hints = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        return SamplingParams()
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    params = {name: hints[name] for name in names if hints.get(name) is not None}
    if isinstance(hints.get("max_new_tokens"), int):
        params["max_tokens"] = hints["max_new_tokens"]
    return SamplingParams(**params)
