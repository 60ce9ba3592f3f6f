"""The tokenizer off the event loop: text to ids and back in threads, each call with a time box."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...runtime.tokenizer import Message, Tokenizer
from .api_errors import ApiError
from .protocol.request_models import ChatMessage

TIME_BOX_S = 30.0
NUM_THREADS = 4
Result = TypeVar("Result")


class AsyncTokenizer:
    """What of the tokenizer the server uses."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(NUM_THREADS, "lockstep-text")
        tokenizer.encode("a")  # the first call sets it up, which is not safe between threads

    async def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return await self._run(lambda: [self._tokenizer.encode(prompt) for prompt in prompts], "prompt")

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation; raises ApiError for one that the model's template does not take."""
        conversation = [_for_template(message) for message in messages]
        try:
            return await self._run(lambda: self._tokenizer.encode_chat(conversation), "messages")
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error

    async def decode(self, ids: Sequence[int], *, skip: bool) -> str:
        """The text of these ids; `skip` leaves out what special tokens say."""
        return await self._run(lambda: self._tokenizer.decode(ids, skip_special_tokens=skip), "tokens")

    async def decode_each(self, ids: Sequence[int]) -> list[str]:
        decode = self._tokenizer.decode
        return await self._run(lambda: [decode([i], skip_special_tokens=False) for i in ids], "tokens")

    async def _run(self, work: Callable[[], Result], param: str) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.wait_for(future, TIME_BOX_S)
        except asyncio.TimeoutError:
            message = f"{param} took more than {TIME_BOX_S:.0f} s to turn into tokens or text; send less"
            raise ApiError(400, message, param=param, code="too_complex") from None


def _for_template(message: ChatMessage) -> Message:
    """Templates know a system and take one string: parts are joined by a new line, as vLLM does."""
    content = message.content
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return {"role": "system" if message.role == "developer" else message.role, "content": text}
