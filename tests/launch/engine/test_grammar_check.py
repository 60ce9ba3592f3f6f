"""The grammar compiler's process: killed from outside, it is replaced, and no request notices."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from lockstep.launch.child_process import ChildProcess
from lockstep.launch.engine import grammar_check
from lockstep.launch.engine.grammar_check import GrammarCheck, GrammarsWaiting
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.request import RequestRefused
from lockstep.runtime.sampling.grammar import Vocabulary
from lockstep.runtime.structured_outputs import StructuredOutputsParams

pytestmark = pytest.mark.process


@pytest.fixture
def check() -> Iterator[GrammarCheck]:
    started = GrammarCheck(Vocabulary(Path(DEMO_MODEL), 2048, [1]), time_limit_s=20.0)
    yield started
    started.close()


def compile_regex(check: GrammarCheck, regex: str) -> None:
    asyncio.run(check.check(StructuredOutputsParams(regex=regex)))


def pid(check: GrammarCheck) -> int:
    assert check._process is not None
    return check._process.pid


def test_wait_for_other_grammars_has_a_deadline(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "WAIT_S", 0.05)
    release = threading.Event()
    check._thread.submit(release.wait)
    with pytest.raises(GrammarsWaiting, match=r"^the grammar has waited 0\.05 s for other grammars; try again later"):
        compile_regex(check, "a")
    release.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_compiler_killed_while_idle_is_replaced(check: GrammarCheck, number: signal.Signals) -> None:
    compile_regex(check, "a")
    first = pid(check)
    os.kill(first, number)
    compile_regex(check, "b")
    assert pid(check) != first


def test_compiler_killed_while_it_compiles_compiles_again(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_regex(check, "a")
    first = pid(check)
    os.kill(first, signal.SIGSTOP)  # so that it has the request, and no answer

    def kill_later() -> None:
        time.sleep(0.3)
        os.kill(first, signal.SIGKILL)

    threading.Thread(target=kill_later).start()
    compile_regex(check, "b")
    assert pid(check) != first


def test_compiler_that_ends_twice_refuses_the_grammar(check: GrammarCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar is to blame, and others are compiled."""

    class DyingProcess(ChildProcess):
        def request(self, line: bytes, timeout_s: float) -> object:
            if b"deadly" in line:
                os.kill(self.pid, signal.SIGKILL)
            return super().request(line, timeout_s)

    monkeypatch.setattr(grammar_check, "ChildProcess", DyingProcess)
    with pytest.raises(RequestRefused, match=r"^structured_outputs=regex ended the compiler: it takes more than 4 GiB"):
        compile_regex(check, "deadly")
    compile_regex(check, "a")


def test_rules_too_deep_for_stack_of_ranks_are_refused(check: GrammarCheck) -> None:
    """A thread of glibc has 2 MiB under `ulimit -s unlimited`: a chain of 700 rules would end the server."""

    def compile_chain(length: int) -> None:
        rules = [f'x{i}: "a" x{i + 1}' for i in range(length)]
        grammar = "\n".join(["start: x0", *rules, f'x{length}: "b"'])
        asyncio.run(check.check(StructuredOutputsParams(grammar=grammar)))

    compile_chain(200)
    with pytest.raises(RequestRefused, match=r"ended the compiler: .* nested too deeply; give a simpler one$"):
        compile_chain(600)


@pytest.mark.parametrize(("kills", "error"), [(2, None), (3, GrammarsWaiting)])
def test_compiler_killed_while_it_starts_is_no_grammars_fault(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch, kills: int, error: type[Exception] | None
) -> None:
    left = [None] * kills

    class KilledProcess(ChildProcess):
        def answer(self, timeout_s: float) -> object:
            if left:
                os.kill(self.pid, signal.SIGKILL)
                left.pop()
            return super().answer(timeout_s)

    monkeypatch.setattr(grammar_check, "ChildProcess", KilledProcess)
    with pytest.raises(error, match="cannot be started") if error else nullcontext():
        compile_regex(check, "a")
    compile_regex(check, "b")


@pytest.mark.parametrize("has_started", [False, True])
def test_interrupted_compilation_does_not_answer_the_next_one(
    check: GrammarCheck, monkeypatch: pytest.MonkeyPatch, has_started: bool
) -> None:
    def interrupt(process: ChildProcess, timeout_s: float | None) -> None:
        raise KeyboardInterrupt

    if has_started:
        compile_regex(check, "[a-z]+")
    with monkeypatch.context() as patch:
        patch.setattr(ChildProcess, "answer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile_regex(check, "a{3}")
    with pytest.raises(ValueError, match="regex"):
        compile_regex(check, "a(")
    compile_regex(check, "[0-9]+")


def test_closed_compiler_is_not_started(check: GrammarCheck) -> None:
    check.close()
    with pytest.raises(GrammarsWaiting, match="closed"):
        check._problem(b"{}", "regex")
