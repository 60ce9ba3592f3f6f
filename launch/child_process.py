"""A child process that answers in lines of JSON, each within a deadline.

Work that may hang or take all memory runs in a process, because a process can be killed where a thread cannot.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

EXIT_S = 2.0  # a killed process that is stuck in a driver is not waited for any longer
STDERR_BYTES = 1 << 16  # of the end of stderr, to find its last line


class ChildFailed(RuntimeError):
    """The child process ended without an answer; the message is the last line of its stderr."""


class ChildProcess:
    """One Python process, in its own session, with a socket as its stdin and stdout.

    arguments     the command line after `python`, see `calling`
    memory_bytes  limit of the process's data segment; no limit if None
    """

    def __init__(self, arguments: Sequence[str], *, memory_bytes: int | None = None) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._socket, child_end = socket.socketpair()
        with child_end:  # a session: Ctrl-C does not reach the child, and `close` ends all that the child has started
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=child_end.fileno(),
                stdout=child_end.fileno(),
                stderr=self._stderr,
                start_new_session=True,
            )
        if memory_bytes is not None:
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))

    @property
    def pid(self) -> int:
        """The process id, which is also that of its session and group."""
        return self._process.pid

    def request(self, line: bytes, timeout_s: float) -> Any:
        """Send a line of JSON and return the answer, as `answer` does."""
        self._socket.settimeout(timeout_s)
        with suppress(BrokenPipeError, ConnectionResetError):  # the process has ended, and `answer` raises the reason
            self._socket.sendall(line + b"\n")
        return self.answer(timeout_s)

    def answer(self, timeout_s: float) -> Any:
        """Return the value in the next line of JSON.

        Raises TimeoutError if the process is silent for timeout_s, and ChildFailed if it ends.
        """
        self._socket.settimeout(timeout_s)
        line = bytearray()
        while not line.endswith(b"\n"):
            piece = self._receive()
            if not piece:
                raise ChildFailed(self._last_error())
            line += piece
        return msgspec.json.decode(line)

    def close(self) -> None:
        """Kill the process and all that it has started; safe to call twice, and from another thread."""
        if self._socket.fileno() == -1:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)
        self._socket.close()
        self._stderr.close()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 16)
        except TimeoutError:
            raise
        except OSError:  # closed here or by the process
            return b""

    def _last_error(self) -> str:
        try:
            self._stderr.seek(-min(STDERR_BYTES, self._stderr.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        except ValueError:  # closed by another thread
            lines = []
        return (lines or ["no message"])[-1]


def calling(function: Callable[[], None]) -> list[str]:
    """Return the arguments of a Python process that calls a function of a module."""
    return ["-c", f"from {function.__module__} import {function.__name__} as main; main()"]
