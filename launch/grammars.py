"""Grammars that clients send are tried in a process of their own, which is killed when one takes too long.

The compiler counts its work and gives up by itself (runtime/grammar.py); the time box is for what its counts miss, and
the memory limit likewise. Neither the event loop nor the ranks see a grammar before it has passed.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from collections import OrderedDict
from contextlib import suppress

import msgspec

from ..runtime.frontend import RequestRefused
from ..runtime.grammar import Vocabulary
from ..runtime.structured import StructuredOutputsParams

log = logging.getLogger(__name__)
TIME_BOX_S = 2.0
START_S = 60.0  # Python and the tokenizer, on a busy machine
MEMORY_BYTES = 4 * 2**30
REMEMBERED = 256  # grammars that have passed


class GrammarCheck:
    """Whether ranks can take a grammar; the process starts with the first and ends with `close`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._turn: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._passed: OrderedDict[bytes, None] = OrderedDict()

    async def check(self, params: StructuredOutputsParams) -> None:
        """Raises RequestRefused, saying what is wrong or which limit was met."""
        # Who leaves early does not take the answer's place: the next one would read it as its own.
        error = await asyncio.shield(asyncio.ensure_future(self._trouble(params)))
        if error is not None:
            raise RequestRefused(error)

    def close(self) -> None:
        """End the process; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()

    def _lock(self) -> asyncio.Lock:
        """One at a time; a new lock, and a new process, for who comes from another event loop."""
        loop = asyncio.get_running_loop()
        if self._turn is None or self._turn[0] is not loop:
            self.close()
            self._turn = loop, asyncio.Lock()
        return self._turn[1]

    async def _trouble(self, params: StructuredOutputsParams) -> str | None:
        line = msgspec.json.encode(params)
        async with self._lock():
            if line in self._passed:
                self._passed.move_to_end(line)
                return None
            error = await self._ask(line, params.kind)
            if error is None:
                self._passed[line] = None
                if len(self._passed) > REMEMBERED:
                    self._passed.popitem(last=False)
            return error

    async def _ask(self, line: bytes, kind: str) -> str | None:
        try:
            if self._process is None:
                error = await self._start()
                if error is not None:
                    return error
            process = self._process
            assert process is not None
            assert process.stdin is not None
            process.stdin.write(line + b"\n")
            return await self._answer(process, TIME_BOX_S)
        except asyncio.TimeoutError:
            self.close()
            return f"structured_outputs={kind} takes more than {TIME_BOX_S:g} s to compile; give a simpler one"
        except (OSError, EOFError):
            self.close()
            limit = f"{MEMORY_BYTES // 2**30} GiB"
            return f"structured_outputs={kind} ended the compiler, which has {limit} of memory; give a simpler one"

    async def _start(self) -> str | None:
        """Why no grammar can be used at all, or None."""
        vocabulary = self._vocabulary
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "lockstep.runtime.grammar",
            str(vocabulary.folder), str(vocabulary.size), *map(str, vocabulary.eos_token_ids),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        return await self._answer(process, START_S)

    async def _answer(self, process: asyncio.subprocess.Process, timeout_s: float) -> str | None:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), timeout_s)
        if not line:
            raise EOFError("the compiler has ended")
        return msgspec.json.decode(line, type=str | None)
