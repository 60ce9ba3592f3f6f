"""Text to token ids and back: the checkpoint's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .detokenizer import TokenBytes
from .tokenizer_loader import load_tokenizer

Message = dict[str, Any]


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`; raises ValueError if transformers cannot load it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer in {folder} has no fast version; convert it to tokenizer.json")
        self._decode: Callable[..., str] = backend.decode
        self.token_bytes = TokenBytes(backend)

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
        return self._decode(list(ids), skip_special_tokens=skip_special_tokens)
