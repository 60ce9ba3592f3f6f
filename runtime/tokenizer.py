"""Text to token ids and back: the checkpoint's tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .chat_template import Message, render_chat
from .detokenizer import TokenBytes
from .text_worker import ChatJob, TokenizerState, encode
from .tokenizer_loader import check_backend, load_tokenizer

FILE_NAMES = {"vocab_file", "merges_file", "tokenizer_file", "name_or_path", "tokenizer_object", "backend"}


class Tokenizer:
    """The tokenizer of the checkpoint in `folder`; raises ValueError if transformers cannot load it.

    chat_template  takes the place of the checkpoint's own
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        self._tokenizer = load_tokenizer(folder)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer in {folder} has no fast version; convert it to tokenizer.json")
        check_backend(backend, folder)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        self._backend = backend
        self._decode: Callable[..., str] = backend.decode
        self.token_bytes = TokenBytes(backend)
        if chat_template is not None:
            self._set_template(chat_template)
        added = backend.get_added_tokens_decoder().items()
        self.special_tokens = {token.content: int(i) for i, token in added if token.special}
        self.response_template: dict[str, Any] | None = getattr(self._tokenizer, "response_template", None)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt, with or without the special tokens that the tokenizer adds."""
        return encode(self._backend, text, add_special_tokens=add_special_tokens)

    def encode_words(self, words: Iterable[str]) -> list[list[int]]:
        """Return the token ids of each word, alone and after a space, each sequence once and none that is empty."""
        spellings = [prefix + word.lstrip() for word in words for prefix in ("", " ")]
        sequences = [self.encode(text, add_special_tokens=False) for text in spellings]
        return [list(ids) for ids in dict.fromkeys(map(tuple, sequences)) if ids]

    def _set_template(self, chat_template: str) -> None:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        self._tokenizer.chat_template = chat_template
        try:
            self._tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError, LookupError, ValueError):
            pass  # it wants another conversation

    @property
    def chat_template(self) -> str:
        """The chat template, or all of them as one text; empty without one."""
        templates = self._tokenizer.chat_template or ""
        return "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)

    def names(self, ids: Iterable[int]) -> list[str]:
        """Return what the vocabulary calls each id; an id that it does not have is called as its number."""
        return [self._backend.id_to_token(i) or str(i) for i in ids]

    @property
    def info(self) -> dict[str, Any]:
        """The configuration as in tokenizer_config.json, without the names of files, and with the chat template."""
        config = {name: value for name, value in self._tokenizer.init_kwargs.items() if name not in FILE_NAMES}
        config["tokenizer_class"] = type(self._tokenizer).__name__
        if self._tokenizer.chat_template:
            config["chat_template"] = self._tokenizer.chat_template
        info: dict[str, Any] = json.loads(
            json.dumps(config, default=lambda value: getattr(value, "content", str(value)))
        )
        return info

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Return the token ids of a conversation in the chat template; the arguments are those of `chat_job`."""
        job = self.chat_job(messages, variables)
        return encode(self._backend, render_chat(job.template, job.messages, job.variables), add_special_tokens=False)

    def chat_job(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> ChatJob:
        """Return what renders and tokenizes a conversation, up to the assistant's answer.

        variables  for the template, as in `render_chat`; `chat_template` replaces the checkpoint's template
        Raises ValueError without a chat template.
        """
        variables = {**self._tokenizer.special_tokens_map, **(variables or {})}
        variables.setdefault("add_generation_prompt", not variables.get("continue_final_message"))
        template = variables.pop("chat_template", None)
        if not template and not self._tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template; use generate with a prompt instead of chat")
        template = self._tokenizer.get_chat_template(template, variables.get("tools"))
        return ChatJob(template, list(messages), variables)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def to_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json."""
        return str(self._backend.to_str())

    def state(self, time_limit_s: float, niceness: int = 0) -> TokenizerState:
        """Return what a process needs to tokenize like this."""
        return TokenizerState(self.to_json(), bool(self._backend.encode_special_tokens), time_limit_s, niceness)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of these ids alone."""
        return self._decode(list(ids), skip_special_tokens=skip_special_tokens)
