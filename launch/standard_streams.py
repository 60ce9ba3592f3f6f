"""stdin, stdout and stderr that cannot stop the process: closed ones are replaced, and stderr never blocks a caller.

A full pipe that nobody reads blocks every write to it. stderr therefore gets a bounded queue and a thread that writes.
Native libraries write to the descriptor itself, which is opened again without blocking: their output is then lost.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import select
import stat
import sys
import threading
import time
from contextlib import suppress
from queue import SimpleQueue

from ..comm.message_text import last_line

STDERR = 2
MAX_QUEUED = 1000  # pieces of text, usually lines
POLL_MS = 1000
FLUSH_S = 2.0  # at exit the queue has this time to be written
REPEAT_S = 1.0  # a throttled message is logged once in this time


def protect_standard_streams() -> None:
    """Open the standard streams that are closed, and put a queue before stderr, unless a program has replaced it."""
    for descriptor in range(STDERR + 1):
        with suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: a socket would get it otherwise
    if sys.__stdin__ is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - open until the process ends
    if sys.__stdout__ is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is sys.__stderr__:
        _stop_blocking(STDERR)
        queued = QueuedStderr(STDERR)
        sys.stderr = queued
        atexit.register(queued.finish, FLUSH_S)


def _stop_blocking(descriptor: int) -> None:
    """Open a pipe or terminal again without blocking; other processes that share it keep their mode."""
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
        with suppress(OSError):  # it may belong to another user; then only the queue protects
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            again = os.open(f"/proc/self/fd/{descriptor}", flags)
            os.dup2(again, descriptor)
            os.close(again)


class QueuedStderr(io.TextIOBase):
    """A text stream that never blocks: a thread writes to the descriptor. What does not fit is dropped and counted."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()  # a signal handler may write to it too
        self._num_dropped = 0  # lines
        self._is_finished = False
        threading.Thread(target=self._write_queued, name="lockstep-stderr", daemon=True).start()

    def write(self, text: str, /) -> int:
        """Queue a piece of text; returns its length."""
        if self._is_finished:
            self._write_all(text)
        elif self._queue.qsize() >= MAX_QUEUED:
            self._num_dropped += text.count("\n")
        else:
            self._queue.put(self._take_notice() + text)
        return len(text)

    def drain(self, timeout_s: float) -> bool:
        """Wait up to timeout_s until all that is queued has been written; returns whether it has."""
        written = threading.Event()
        self._queue.put(written)
        return written.wait(timeout_s)

    def finish(self, timeout_s: float) -> None:
        """Drain the queue; if somebody reads, write directly from now on: the thread ends with the interpreter."""
        self._is_finished = self.drain(timeout_s)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def _take_notice(self) -> str:
        """Return the line that says how many lines were dropped before, once; empty if none were."""
        number, self._num_dropped = self._num_dropped, 0
        return f"{number} log lines were dropped: stderr was not read in time\n" if number else ""

    def _write_queued(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, str):
                self._write_all(item)
            if self._queue.empty():
                self._write_all(self._take_notice())
            if isinstance(item, threading.Event):
                item.set()

    def _write_all(self, text: str) -> None:
        data = text.encode(self.encoding, self.errors)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                if self._is_finished:
                    return
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(POLL_MS)
            except OSError:  # nobody can read it any more
                return


class Throttle(logging.Filter):
    """Passes equal messages once in REPEAT_S, with the number of those left out: strangers can cause any number."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}  # time of the last line of each message
        self._num_hidden: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log this record."""
        message, now = str(record.msg), time.monotonic()
        if now - self._last.get(message, -REPEAT_S) < REPEAT_S:
            self._num_hidden[message] = self._num_hidden.get(message, 0) + 1
            return False
        self._last[message] = now
        if number := self._num_hidden.pop(message, 0):
            record.msg, record.args = f"{record.getMessage()} ({number} more since the last such line)", None
        return True


class WithoutTraceback(logging.Filter):
    """Puts the text of an exception at the end of its log line, instead of a traceback below it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten the record; return True."""
        if record.exc_info and (error := record.exc_info[1]) is not None:
            record.msg, record.args = f"{record.getMessage()}: {last_line(str(error), type(error).__name__)}", None
            record.exc_info = record.exc_text = None
        return True


WITHOUT_TRACEBACK = WithoutTraceback()
