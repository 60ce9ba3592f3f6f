"""Chat templates and long texts in a child process, which is killed when a job exceeds its time or memory.

A template is a program of the checkpoint's author and need not end. Tokenization cannot be interrupted in a thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..comm.message_text import first_line
from ..runtime.chat_template import Message
from ..runtime.request import RequestRefused
from ..runtime.text_worker import Job, main
from ..runtime.tokenizer import Tokenizer
from .child_process import ChildFailed, ChildProcess, calling, retry_ended
from .errors import TokenizerBusy

log = logging.getLogger(__name__)
START_S = 60.0  # start of Python and Jinja on a busy machine
MEMORY_BYTES = 2 * 2**30  # a text of 4 MiB with a token for each character takes 0.9 GiB
TIME_LIMIT_S = 10.0


class TextRefused(RequestRefused):
    """A text or a conversation cannot be tokenized; `code` is "too_complex" at the limits of time and memory."""

    def __init__(self, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.code = code


class TextProcess:
    """A process that runs jobs one at a time, each within `time_limit_s`, from the first one until `close`.

    A process that was killed is replaced at the next job. `niceness` is added to that of this process.
    """

    def __init__(self, tokenizer: Tokenizer, time_limit_s: float = TIME_LIMIT_S, niceness: int = 0) -> None:
        self._tokenizer, self._time_limit_s, self._niceness = tokenizer, time_limit_s, niceness
        self._process: ChildProcess | None = None
        self._closed = False

    def start(self) -> ChildProcess:
        """Start the process ahead of its first job; raises TokenizerBusy if that is not possible."""
        if self._process is not None:
            return self._process
        try:
            return retry_ended(self._start_once)
        except (ChildFailed, OSError) as error:  # TimeoutError is an OSError
            self._kill()
            if not self._closed:  # by another thread, which has ended it
                log.warning("the process that tokenizes cannot be started: %s", error)
            raise TokenizerBusy(f"the process that tokenizes cannot be started: {error}") from error
        except BaseException:  # Ctrl-C: as in `run`
            self._kill()
            raise

    def run(self, job: bytes) -> Any:
        """Return the result of a job from `encode_job`; raises TextRefused if it cannot be done, and TokenizerBusy."""
        try:
            answer = self._answer(job)
        except (TimeoutError, ChildFailed) as error:
            self._kill()
            message = f"took more than {self._time_limit_s:g} s to turn into tokens or text"
            if isinstance(error, ChildFailed):
                log.warning("a text has ended the process that tokenizes: %s", error)
                memory = f"{MEMORY_BYTES // 2**30} GiB of memory"
                message = f"ended the process that turns it into tokens or text, which has {memory}"
            raise TextRefused(f"the input {message}; send less", "too_complex") from error
        except BaseException:  # Ctrl-C: the answer may still come, and would be taken for that of the next job
            self._kill()
            raise
        if isinstance(answer, dict):
            raise TextRefused(answer["error"], answer["code"])
        return answer

    def close(self) -> None:
        """End the process, also during a job; safe to call twice, and from another thread."""
        self._closed = True
        self._kill()

    def _start_once(self) -> ChildProcess:
        self._kill()
        if self._closed:
            raise TokenizerBusy("the process that tokenizes is closed")
        process = self._process = ChildProcess(calling(main), memory_bytes=MEMORY_BYTES)
        threading.Thread(target=self._watch, args=(process,), name="lockstep-text-watch", daemon=True).start()
        state = self._tokenizer.state(self._time_limit_s, self._niceness)
        process.request(msgspec.json.encode(state), START_S)
        return process

    def _watch(self, process: ChildProcess) -> None:
        """Log an end of the process that `_kill` has not caused."""
        end = process.wait()
        if process is self._process:
            log.warning(
                "the process that tokenizes (pid %d) has ended: %s; the next text starts another", process.pid, end
            )

    def _answer(self, job: bytes) -> Any:
        try:
            return self.start().request(job, self._time_limit_s)
        except ChildFailed:  # it may have been killed from outside: the job has a second process
            self._kill()
            return self.start().request(job, self._time_limit_s)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


def encode_job(job: Job) -> bytes:
    """Return a job in JSON; raises TextRefused for values that JSON does not have."""
    try:
        return msgspec.json.encode(job)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise TextRefused(f"the input is not JSON: {first_line(error)}") from error


class IsolatedTokenizer(Tokenizer):
    """A Tokenizer that renders chat templates in a separate process; `close` ends it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._process = TextProcess(self)

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Return the token ids of a conversation; raises TextRefused, also at the limits of time and memory."""
        ids: list[int] = self._process.run(encode_job(self.chat_job(messages, variables)))
        return ids

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._process.close()
