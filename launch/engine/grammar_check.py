"""A check of clients' grammars in a child process, which is killed when a grammar takes too long.

The compiler counts its work and stops at its limits (runtime/sampling/grammar.py). The time and memory limits here are
for work that it does not count. The process also computes a few masks, and refuses a grammar whose masks are slow.
Only grammars that pass reach the ranks.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from ...runtime.request import RequestRefused
from ...runtime.sampling.grammar import Vocabulary
from ...runtime.structured_outputs import StructuredOutputsParams
from ..child_process import ChildFailed, ChildProcess, retry_ended
from .bounded_wait import result_within

log = logging.getLogger(__name__)
START_S = 60.0  # start of Python and the tokenizer on a busy machine
MEMORY_BYTES = 4 * 2**30
WAIT_S = 90.0  # longest wait for a result, including the grammars before it
MAX_WAITING = 16  # grammars that wait for the compiler: each may take the time limit and a new start
MAX_REMEMBERED = 256  # accepted grammars, which are not compiled again


class GrammarsWaiting(RequestRefused):
    """Too many other grammars are being compiled, or none can be; the request may be sent again."""


class GrammarCheck:
    """A compiler of grammars, within `time_limit_s` each, in a process from the first one until `close`."""

    def __init__(self, vocabulary: Vocabulary, time_limit_s: float = 2.0) -> None:
        self._vocabulary, self.time_limit_s = vocabulary, time_limit_s
        self._thread = ThreadPoolExecutor(1, "lockstep-grammars")  # waits for the process, one grammar at a time
        self._process: ChildProcess | None = None
        self._closed = False
        self._num_ends = 0  # times that the process has ended by itself
        self._passed: OrderedDict[bytes, None] = OrderedDict()
        self._answers: dict[bytes, Future[str | None]] = {}  # results of the grammars that are being compiled or wait

    async def check(self, params: StructuredOutputsParams) -> None:
        """Compile a grammar; raises RequestRefused naming the mistake or the limit, or GrammarsWaiting."""
        line = msgspec.json.encode(params)
        if line in self._passed:  # it does not wait for the grammars that are being compiled
            return
        answer = self._answers.get(line)
        if answer is None:
            if len(self._answers) >= MAX_WAITING:
                raise GrammarsWaiting(f"{MAX_WAITING} other grammars are being compiled; try again later")
            answer = self._answers[line] = self._thread.submit(self._problem, line, params.kind)
            answer.add_done_callback(lambda _: self._answers.pop(line, None))
        late = GrammarsWaiting(f"the grammar has waited {WAIT_S:g} s for other grammars; try again later")
        # Not cancelled with this request: others may wait for the same answer.
        error = await result_within(WAIT_S, asyncio.shield(asyncio.wrap_future(answer)), late)
        if error is not None:
            raise RequestRefused(error)

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._kill()

    def _problem(self, line: bytes, kind: str) -> str | None:
        """Return why this grammar cannot be used, or None; grammars that have passed are remembered."""
        if line in self._passed:
            self._passed.move_to_end(line)
            return None
        num_ends = self._num_ends
        error = self._attempt(line, kind)
        if self._num_ends > num_ends:  # perhaps something else has ended the process, and long ago
            error = self._attempt(line, kind)
        if error is None:
            self._passed[line] = None
            if len(self._passed) > MAX_REMEMBERED:
                self._passed.popitem(last=False)
        return error

    def _attempt(self, line: bytes, kind: str) -> str | None:
        error = self._start() if self._process is None else None
        return error or self._compile(line, kind)

    def _start(self) -> str | None:
        """Start the process; return why no grammar can be used, or None. Raises GrammarsWaiting if that fails."""
        try:
            return retry_ended(self._start_once)
        except (ChildFailed, OSError) as error:  # TimeoutError is an OSError
            self._kill()
            log.warning("the grammar compiler cannot be started: %s", error)
            raise GrammarsWaiting(f"the grammar compiler cannot be started: {error}; try again later") from error
        except BaseException:  # Ctrl-C: as in `_compile`
            self._kill()
            raise

    def _start_once(self) -> str | None:
        self._kill()
        if self._closed:
            raise GrammarsWaiting("the grammar compiler is closed")
        vocabulary = self._vocabulary
        module = "lockstep.runtime.sampling.grammar"
        arguments = ["-m", module, str(vocabulary.folder), str(vocabulary.size), *map(str, vocabulary.eos_token_ids)]
        self._process = ChildProcess(arguments, memory_bytes=MEMORY_BYTES)
        problem: str | None = self._process.answer(START_S)
        return problem

    def _compile(self, line: bytes, kind: str) -> str | None:
        """Return why a grammar is refused, or None. A process that fails is ended, and the next grammar has another."""
        process, limit = self._process, self.time_limit_s
        assert process is not None
        try:
            problem: str | None = process.request(line, limit)
            return problem
        except TimeoutError:
            reason = f"structured_outputs={kind} takes more than {limit:g} s to compile"
        except ChildFailed as error:
            log.warning("the grammar compiler ended: %s", error)
            self._num_ends += 1
            memory = f"{MEMORY_BYTES // 2**30} GiB of memory"
            reason = (
                f"structured_outputs={kind} ended the compiler: it takes more than {memory}, or is nested too deeply"
            )
        except BaseException:  # Ctrl-C: the answer may still come, and would be taken for that of the next grammar
            self._kill()
            raise
        self._kill()
        return f"{reason}; give a simpler one"

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()
