"""Text to token ids and back: the checkpoint's own tokenizer and chat template, and text that grows token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .request import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_PARTIAL = 8  # tokens that may spell one unfinished character; more of them are simply not valid UTF-8
CONTEXT = 6  # tokens of the prompt that decide how the first tokens of the output are spaced

Message = dict[str, Any]


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`; raises ValueError where there is none that transformers can load."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # costs 1-2 s: only a process that has text to tokenize pays

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no usable tokenizer in {folder}: {str(error).strip().splitlines()[0]}") from error
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer in {folder} has no fast version; convert it to tokenizer.json")
        self.decode_ids: Callable[..., str] = backend.decode

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens added as the tokenizer is set up to."""
        return [int(i) for i in self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation through the model's chat template, up to where the assistant begins to speak."""
        from jinja2.exceptions import TemplateError

        if not self._tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template; use generate with a prompt instead of chat")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template does not accept these messages: {error}") from error
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids alone."""
        return self.decode_ids(list(ids), skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """The text of one output as its tokens come, never cutting a character in half.

    Decodes a window twice, without and with the new tokens, and takes the difference: the spacing between tokens then
    comes out as in the whole (the two-offset method of text-generation-inference).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._decode = tokenizer.decode_ids
        self._skip = skip_special_tokens
        self._ids = [int(i) for i in prompt[-CONTEXT:]]
        self._window = 0  # start of what is decoded
        self._done = len(self._ids)  # end of what has been given out

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token)
        return self._take(final=len(self._ids) - self._done > LONGEST_PARTIAL)

    def flush(self) -> str:
        """What is left when no more tokens come; bytes of an unfinished character show as replacement characters."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._window : self._done], skip_special_tokens=self._skip)
        now = self._decode(self._ids[self._window :], skip_special_tokens=self._skip)
        if now.endswith(REPLACEMENT) and not final:
            return ""
        self._window, self._done = self._done, len(self._ids)
        return now[len(before) :]


def default_sampling_params(folder: Path) -> SamplingParams:
    """What the checkpoint's generation_config.json recommends; SamplingParams() where it is silent or absent."""
    try:
        hints = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        return SamplingParams()
    names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    chosen = {name: hints[name] for name in names if hints.get(name) is not None}
    if isinstance(hints.get("max_new_tokens"), int):
        chosen["max_tokens"] = hints["max_new_tokens"]
    return SamplingParams(**chosen)
