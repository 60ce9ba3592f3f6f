"""The process that tokenizes long texts and renders chat templates, from `main`; it may be killed at any time.

The first line of its input is a TokenizerState, each later one a job. It answers each with a line of JSON: the result,
or an error with OpenAI's code if the input is at fault. It imports nothing slow but Jinja.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

from ..comm.message_text import first_line
from .chat_template import render_chat

MAX_TOKENS = 2**20  # most token ids in an answer


class TokenizerState(msgspec.Struct, frozen=True):
    """A tokenizer as text, the longest time of a job, and the additional niceness of the process."""

    tokenizer_json: str
    encode_special_tokens: bool
    time_limit_s: float
    niceness: int


class EncodeJob(msgspec.Struct, frozen=True, tag=True):
    """Texts to tokenize; the result is a list of token ids for each."""

    texts: list[str]
    add_special_tokens: bool = True


class ChatJob(msgspec.Struct, frozen=True, tag=True):
    """A conversation to render and tokenize, of up to `max_chars` characters; the result is a list of token ids."""

    template: str
    messages: list[Any]
    variables: dict[str, Any]
    max_chars: int = sys.maxsize
    add_special_tokens: bool = False


class DecodeJob(msgspec.Struct, frozen=True, tag=True):
    """Token ids to turn into text; the result is the text."""

    ids: list[int]
    skip_special_tokens: bool


class TooLong(ValueError):
    """A text has too many characters or tokens."""


Job = EncodeJob | ChatJob | DecodeJob


def encode(backend: Backend, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of a text; other threads run meanwhile. Raises ValueError if the tokenizer fails."""
    try:  # the only method that releases the GIL; it also leaves out the offsets
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    except BaseException as error:
        if not is_tokenizer_error(error):
            raise
        raise ValueError(f"the tokenizer cannot encode this text: {first_line(error)}") from error
    ids: list[int] = encoding.ids
    return ids


def is_tokenizer_error(error: BaseException) -> bool:
    """Return whether an error may come from the tokenizers library: it raises plain Exception, and Rust's panics."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def run_job(backend: Backend, job: Job) -> Any:
    """Return the result of a job; raises ValueError if its input is at fault."""
    if isinstance(job, DecodeJob):
        return backend.decode(job.ids, skip_special_tokens=job.skip_special_tokens)
    if isinstance(job, ChatJob):
        text = render_chat(job.template, job.messages, job.variables)
        if len(text) > job.max_chars:
            raise TooLong(f"{len(text)} characters in the chat template, at most {job.max_chars} fit")
        return _at_most(MAX_TOKENS, encode(backend, text, add_special_tokens=job.add_special_tokens))
    results: list[list[int]] = []
    for text in job.texts:
        room = MAX_TOKENS - sum(map(len, results))
        results.append(_at_most(room, encode(backend, text, add_special_tokens=job.add_special_tokens)))
    return results


def _at_most(limit: int, ids: list[int]) -> list[int]:
    if len(ids) > limit:
        raise TooLong(f"{len(ids)} tokens or more, one request takes {MAX_TOKENS}")
    return ids


def main() -> None:
    """Answer jobs until the input ends."""
    state = msgspec.json.decode(sys.stdin.buffer.readline(), type=TokenizerState)
    os.nice(state.niceness)
    backend = Backend.from_str(state.tokenizer_json)
    backend.encode_special_tokens = state.encode_special_tokens
    render_chat("", [], {})  # imports Jinja, which is not to count as the time of the first job
    print('"ready"', flush=True)
    decoder = msgspec.json.Decoder(Job)
    for line in sys.stdin.buffer:
        signal.alarm(math.ceil(state.time_limit_s) + 1)  # ends this process if nobody is left to kill it
        try:
            answer = run_job(backend, decoder.decode(line))
        except TooLong as error:
            answer = {"error": f"the input is too long: {error}; send less", "code": "context_length_exceeded"}
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises any class
            answer = {"error": first_line(error), "code": "invalid_value"}
        signal.alarm(0)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
