"""Grammars that clients send are tried in a process of their own, which is killed when one takes too long.

The compiler counts its work and gives up by itself (runtime/grammar.py); the time box is for what its counts miss, and
the memory limit likewise. Neither the event loop nor the ranks see a grammar before it has passed.
"""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ...runtime.request import RequestRefused
from ...runtime.sampling.grammar import Vocabulary
from ...runtime.structured_outputs import StructuredOutputsParams

TIME_BOX_S = 2.0
START_S = 60.0  # Python and the tokenizer, on a busy machine
MEMORY_BYTES = 4 * 2**30
REMEMBERED = 256  # grammars that have passed


class GrammarCheck:
    """Whether ranks can take a grammar; the process starts with the first and ends with `close`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, "lockstep-grammars")  # talks to the process, one grammar at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._passed: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, params: StructuredOutputsParams) -> None:
        """Raises RequestRefused, saying what is wrong or which limit was met."""
        error = await asyncio.get_running_loop().run_in_executor(self._thread, self._trouble, params)
        if error is not None:
            raise RequestRefused(error)

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._kill()

    def _trouble(self, params: StructuredOutputsParams) -> str | None:
        line = msgspec.json.encode(params)
        if line in self._passed:
            self._passed.move_to_end(line)
            return None
        error = self._start() if self._process is None else None
        error = error or self._ask(line + b"\n", TIME_BOX_S, f"structured_outputs={params.kind}")
        if error is None:
            self._passed[line] = None
            if len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)
        return error

    def _start(self) -> str | None:
        """Why no grammar can be used at all, or None."""
        vocabulary = self._vocabulary
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.runtime.sampling.grammar",
             str(vocabulary.folder), str(vocabulary.size), *map(str, vocabulary.eos_token_ids)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        return self._ask(b"", START_S, "structured_outputs=... cannot be used: the start of the compiler")

    def _ask(self, line: bytes, timeout_s: float, what: str) -> str | None:
        """Send a line and read the answer; the process that takes too long is killed, which ends any wait for it."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        too_long = threading.Event()

        def expire() -> None:
            too_long.set()
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        finally:
            timer.cancel()
        if answer and not too_long.is_set():
            return msgspec.json.decode(answer, type=str | None)
        self._kill()
        if too_long.is_set():
            return f"{what} takes more than {timeout_s:g} s to compile; give a simpler one"
        return f"{what} ended the compiler, which has {MEMORY_BYTES // 2**30} GiB of memory; give a simpler one"

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes, and leaves no zombie
