"""A child process that answers in lines of JSON, each within a deadline.

Work that may hang or take all memory runs in a process, because a process can be killed where a thread cannot.
"""

from __future__ import annotations

import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

EXIT_S = 2.0  # a killed process that is stuck in a driver is not waited for any longer
PACKAGES = str(Path(__file__).parents[2])  # the folder that this process imports lockstep from
STDERR_BYTES = 1 << 16  # this much of the end of stderr is read, to find its last line
Result = TypeVar("Result")


class ChildFailed(RuntimeError):
    """The child process ended without an answer; the message is the last line of its stderr, or how it ended."""


class ChildProcess:
    """One Python process, with a socket as its stdin and stdout; `calling` makes its arguments.

    It has its own session: Ctrl-C does not reach it, and `close` also ends the processes that it has started. Its data
    segment is limited to `memory_bytes`, unless that is None. It inherits the file descriptors `inherited`, and this
    process's environment unless another one is given. With `inherits_stderr` it also writes to this process's stderr.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        memory_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
        inherited: Sequence[int] = (),
        inherits_stderr: bool = False,
    ) -> None:
        self._stderr = None if inherits_stderr else tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._socket, child_end = socket.socketpair()
        with child_end:
            command, stream = [sys.executable, *arguments], child_end.fileno()
            self._process = subprocess.Popen(
                command,
                stdin=stream,
                stdout=stream,
                stderr=self._stderr,
                env=environment,
                pass_fds=inherited,
                start_new_session=True,
            )
        self.pid = self._process.pid  # its session and group have the same id
        if memory_bytes is not None:
            resource.prlimit(self.pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))

    def request(self, line: bytes, timeout_s: float) -> Any:
        """Send a line of JSON and return the answer, as `answer` does."""
        self._socket.settimeout(timeout_s)
        with suppress(BrokenPipeError, ConnectionResetError):  # the process has ended, and `answer` raises the reason
            self._socket.sendall(line + b"\n")
        return self.answer(timeout_s)

    def has_answer(self, timeout_s: float) -> bool:
        """Wait up to timeout_s; return whether `answer` would return or raise at once."""
        poller = select.poll()  # select.select takes low descriptors only
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(math.ceil(timeout_s * 1000)))

    def answer(self, timeout_s: float | None) -> Any:
        """Return the value in the next line of JSON; None waits without a limit.

        Raises TimeoutError if the process is silent for timeout_s, and ChildFailed if it ends.
        """
        line = bytearray()
        try:
            self._socket.settimeout(timeout_s)
            while not line.endswith(b"\n") and (piece := self._socket.recv(1 << 16)):
                line += piece
        except TimeoutError:
            raise
        except OSError:  # closed by another thread, or by the process before it read a request
            line.clear()
        if not line.endswith(b"\n"):
            raise ChildFailed(self._last_error())
        return msgspec.json.decode(line)

    def wait(self) -> str:
        """Wait until the process has ended, without a time limit; return how it has ended."""
        with suppress(ChildProcessError):  # another thread has taken its exit status
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return self._end()

    def close(self) -> None:
        """Kill the process and all that it has started; safe to call twice, and from another thread."""
        if self._socket.fileno() == -1:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)
        self._socket.close()
        if self._stderr is not None:
            self._stderr.close()

    def _last_error(self) -> str:
        if self._stderr is None:
            return self._end()
        with suppress(ValueError):  # closed by another thread
            self._stderr.seek(-min(STDERR_BYTES, self._stderr.seek(0, os.SEEK_END)), os.SEEK_END)
            lines = self._stderr.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else self._end()
        return "it was closed"

    def _end(self) -> str:
        """Return how the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(EXIT_S)
            return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        return "it has closed its output"


def retry_ended(start: Callable[[], Result]) -> Result:
    """Return the result of `start`, called up to three times if its process ends: something else may have killed it."""
    for _ in range(2):
        with suppress(ChildFailed):
            return start()
    return start()


def session_processes(leader: int) -> list[int]:
    """Return the pids of the other processes in the session of this leader, parents first."""
    pids = []
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader != pid:
                pids.append(pid)
    return pids


def calling(function: Callable[[], None]) -> list[str]:
    """Return the arguments of a Python process that calls a function of a module of lockstep.

    The process does not import from the current folder, where a file may have the name of any module.
    """
    module = f"from {function.__module__} import {function.__name__} as main"
    return ["-c", f"import sys; sys.path = [*filter(None, sys.path), {PACKAGES!r}]; {module}; main()"]
