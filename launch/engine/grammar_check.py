"""Grammars that clients send are tried in a process of their own, which is killed when one takes too long.

The compiler counts its work and gives up by itself (runtime/grammar.py); the time box is for what its counts miss, and
the memory limit likewise. Neither the event loop nor the ranks see a grammar before it has passed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ...runtime.request import RequestRefused
from ...runtime.sampling.grammar import Vocabulary
from ...runtime.structured_outputs import StructuredOutputsParams
from ..child_process import ChildFailed, ChildProcess

log = logging.getLogger(__name__)
TIME_BOX_S = 2.0
START_S = 60.0  # Python and the tokenizer, on a busy machine
MEMORY_BYTES = 4 * 2**30
REMEMBERED = 256  # grammars that have passed


class GrammarCheck:
    """Whether ranks can take a grammar; the process starts with the first and ends with `close`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, "lockstep-grammars")  # talks to the process, one grammar at a time
        self._process: ChildProcess | None = None
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
        error = error or self._compile(line, params.kind)
        if error is None:
            self._passed[line] = None
            if len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)
        return error

    def _start(self) -> str | None:
        """Start the process; return why no grammar can be used at all, or None."""
        vocabulary = self._vocabulary
        module = "lockstep.runtime.sampling.grammar"
        arguments = ["-m", module, str(vocabulary.folder), str(vocabulary.size), *map(str, vocabulary.eos_token_ids)]
        process = self._process = ChildProcess(arguments, memory_bytes=MEMORY_BYTES)
        action = "structured_outputs=... cannot be used: the start of the compiler"
        return self._answer(lambda: process.answer(START_S), START_S, action)

    def _compile(self, line: bytes, kind: str) -> str | None:
        """Compile one grammar in the process; return the error, or None."""
        process = self._process
        assert process is not None
        return self._answer(lambda: process.request(line, TIME_BOX_S), TIME_BOX_S, f"structured_outputs={kind}")

    def _answer(self, wait: Callable[[], str | None], timeout_s: float, action: str) -> str | None:
        """Return the answer of the process, or what ended it: then the next grammar starts another one."""
        try:
            return wait()
        except TimeoutError:
            reason = f"{action} takes more than {timeout_s:g} s to compile; give a simpler one"
        except ChildFailed as error:
            log.warning("the grammar compiler ended: %s", error)
            reason = f"{action} ended the compiler, which has {MEMORY_BYTES // 2**30} GiB of memory; give a simpler one"
        self._kill()
        return reason

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()
