"""The tokenizer off the event loop: lanes for short texts, for conversations, and for everything long.

Short texts have threads of this process to themselves, and a text in them takes milliseconds. Chat templates and long
texts run in two other processes (launch/text_process.py). So neither hostile texts nor templates delay short texts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from ...runtime.chat_template import Message
from ...runtime.detokenizer import PromptText, locate_tokens
from ...runtime.text_worker import MAX_TOKENS, DecodeJob, EncodeJob, Job
from ...runtime.token_bounds import max_chars_per_token
from ...runtime.tokenizer import Tokenizer
from ..errors import TokenizerBusy
from ..text_process import TIME_LIMIT_S, TextProcess, TextRefused, encode_job
from .bounded_wait import result_within

NUM_THREADS = 4
SHORT_CHARS = 16_384  # the longest texts of a request that threads of this process tokenize; 8 ms
SHORT_TOKENS = 4096  # the most token ids that these threads turn into text
SHORT_JOB_BYTES = 65_536  # the longest conversation of the second lane, with its template
LONG_TIME_LIMIT_S = 30.0
LONG_NICENESS = 10  # the engine and short requests go first
WAIT_S = 30.0  # longest wait for a result, including the jobs before it
MAX_WAITING_BYTES = 16 * 2**20  # jobs that wait or run in a lane
Result = TypeVar("Result")


class TokenizationRefused(TextRefused):
    """The text of the request's field `param` cannot be tokenized."""

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message, code)
        self.param = param


class TextLane:
    """The jobs of a TextProcess, in the order of their arrival."""

    def __init__(self, process: TextProcess) -> None:
        self._process = process
        self._thread = ThreadPoolExecutor(1, "lockstep-text")  # waits for the process
        self._num_bytes = 0  # size of the jobs that wait or run

    def start(self) -> None:
        """Start the process without waiting for it."""
        self._thread.submit(self._process.start)

    async def run(self, job: bytes) -> Any:
        """Return the result of a job; raises TokenizerBusy if too many bytes of jobs wait, and as `TextProcess.run`."""
        if self._num_bytes and self._num_bytes + len(job) > MAX_WAITING_BYTES:
            raise TokenizerBusy(f"the server is tokenizing {self._num_bytes} bytes of long texts; try again later")
        self._num_bytes += len(job)
        try:
            return await result_of(self._thread.submit(self._process.run, job))
        finally:
            self._num_bytes -= len(job)

    def close(self) -> None:
        """End the process, and later jobs with TokenizerBusy; safe to call twice."""
        self._process.close()


class AsyncTokenizer:
    """A Tokenizer for asyncio tasks; `source` is the tokenizer itself, for what takes no time.

    The methods raise TokenizationRefused if the input is at fault, and TokenizerBusy if other requests' input is.
    """

    def __init__(self, tokenizer: Tokenizer, time_limit_s: float = TIME_LIMIT_S) -> None:
        self.source = tokenizer
        self._chars_per_token = max_chars_per_token(tokenizer.to_json())
        self._threads = ThreadPoolExecutor(NUM_THREADS, "lockstep-tokenizer")
        self._chats = TextLane(TextProcess(tokenizer, time_limit_s))
        self._long = TextLane(TextProcess(tokenizer, max(time_limit_s, LONG_TIME_LIMIT_S), LONG_NICENESS))

    def start(self) -> None:
        """Start the process of the conversations ahead of the first one."""
        if self.source.has_chat_template:
            self._chats.start()

    async def encode(
        self, prompts: Sequence[str], max_tokens: int = MAX_TOKENS, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Return the token ids of each prompt; refuses one that has more characters than `max_tokens` tokens can."""
        max_chars = self._max_chars(max_tokens)
        for prompt in prompts:
            if len(prompt) > max_chars:
                rule = f"at most {max_chars} fit into {max_tokens} tokens"
                message = f"the prompt is too long: {len(prompt)} characters, {rule}; send less"
                raise TokenizationRefused(message, "prompt", "context_length_exceeded")
        if sum(map(len, prompts)) > SHORT_CHARS:
            job = EncodeJob(list(prompts), add_special_tokens)
            return cast("list[list[int]]", await self._run(self._long, job, "prompt"))
        encode = partial(self.source.encode, add_special_tokens=add_special_tokens)
        try:
            return await self._in_thread(lambda: [encode(prompt) for prompt in prompts])
        except ValueError as error:
            raise TokenizationRefused(str(error), "prompt") from error

    async def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        max_tokens: int = MAX_TOKENS,
        *,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation; `messages` and `variables` are those of `Tokenizer.chat_job`.

        Refuses a conversation that has more characters in its template than `max_tokens` tokens can have.
        """
        try:
            job = self.source.chat_job(messages, variables)
        except ValueError as error:
            raise TokenizationRefused(str(error), "messages") from error
        max_chars = self._max_chars(max_tokens)
        job = msgspec.structs.replace(job, max_chars=max_chars, add_special_tokens=add_special_tokens)
        return cast("list[int]", await self._run(self._chats, job, "messages"))

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of these ids, with or without the special tokens."""
        if len(ids) > SHORT_TOKENS:
            return cast("str", await self._run(self._long, DecodeJob(list(ids), skip_special_tokens), "tokens"))
        return await self._in_thread(lambda: self.source.decode(ids, skip_special_tokens=skip_special_tokens))

    async def names(self, ids: Sequence[int]) -> list[str]:
        """Return what the vocabulary calls each id, as `Ġunto`."""
        return await self._in_thread(lambda: self.source.names(ids))

    async def locate_tokens(self, ids: Sequence[int], text: str | None = None) -> PromptText:
        """Return where each token of a prompt begins in its text, or in the text of `ids` with all special tokens."""
        return await self._in_thread(lambda: locate_tokens(self.source.token_bytes, ids, text))

    def close(self) -> None:
        """End the processes; short texts can still be tokenized. Safe to call twice."""
        self._chats.close()
        self._long.close()

    def _max_chars(self, max_tokens: int) -> int:
        """Return the most characters in so many tokens; sys.maxsize if the tokenizer has no bound."""
        return sys.maxsize if self._chars_per_token is None else self._chars_per_token * max_tokens

    async def _run(self, lane: TextLane, job: Job, param: str) -> Any:
        try:
            line = encode_job(job)
            return await (self._long if len(line) > SHORT_JOB_BYTES else lane).run(line)
        except TextRefused as error:
            raise TokenizationRefused(str(error), param, error.code) from error

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await result_of(self._threads.submit(call))


async def result_of(job: Future[Result]) -> Result:
    """Wait for the result of a thread; raises TokenizerBusy after WAIT_S, and takes back a job that has not begun."""
    late = TokenizerBusy(f"the server is busy: this request waited {WAIT_S:g} s for its tokens; try again later")
    return await result_within(WAIT_S, asyncio.wrap_future(job), late)
