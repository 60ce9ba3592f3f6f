"""The tokenizer off the event loop: a pool of threads, and a time limit for each call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...runtime.detokenizer import PromptText, locate_tokens
from ...runtime.request import RequestRefused
from ...runtime.tokenizer import Message, Tokenizer

NUM_THREADS = 4
Result = TypeVar("Result")


class TokenizationRefused(RequestRefused):
    """The text of the request's field `param` cannot be tokenized, or (`timed_out`) not within the time limit."""

    def __init__(self, message: str, param: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.param, self.timed_out = param, timed_out


class AsyncTokenizer:
    """A Tokenizer for asyncio tasks; every method raises TokenizationRefused after `time_limit_s` seconds."""

    def __init__(self, tokenizer: Tokenizer, time_limit_s: float = 30.0) -> None:
        self._tokenizer, self._time_limit_s = tokenizer, time_limit_s
        self._threads = ThreadPoolExecutor(NUM_THREADS, "lockstep-tokenizer")
        tokenizer.encode("a")  # the first call completes the set-up, which is not safe in two threads at once

    async def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt."""
        return await self._run(lambda: [self._tokenizer.encode(prompt) for prompt in prompts], "prompt")

    async def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; raises TokenizationRefused if the chat template rejects it."""
        try:
            return await self._run(lambda: self._tokenizer.encode_chat(messages), "messages")
        except RequestRefused:
            raise
        except ValueError as error:
            raise TokenizationRefused(str(error), "messages") from error

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of these ids, with or without the special tokens."""
        return await self._run(lambda: self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens), "tokens")

    async def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id after another one, special tokens included."""
        return await self._run(lambda: [self._tokenizer.token_bytes.text(i) for i in ids], "tokens")

    async def locate_tokens(self, ids: Sequence[int], text: str | None = None) -> PromptText:
        """Return where each token of a prompt begins in its text, or in the text of `ids` with all special tokens."""
        return await self._run(lambda: locate_tokens(self._tokenizer.token_bytes, ids, text), "prompt")

    async def _run(self, call: Callable[[], Result], param: str) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the result.
            done, _ = await asyncio.wait((future,), timeout=self._time_limit_s)
        finally:
            future.cancel()
        if not done:
            message = f"{param} took more than {self._time_limit_s:.0f} s to turn into tokens or text; send less"
            raise TokenizationRefused(message, param, timed_out=True)
        return future.result()
