"""Blocks that Ctrl-C and SIGTERM do not cut short, because what they had begun would stay behind.

An exception out of a signal's handler in the middle of torch's import aborts the process or is lost; in the middle of
`ray.init` it leaves servers that nobody knows of; in the middle of an orderly end it leaves the rest. A mask of blocked
signals would not do: processes that are started meanwhile inherit it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 128 + signal.SIGINT
_waiting = False
_terminated = False


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception. Ray's waits take a KeyboardInterrupt for a signal; of a SystemExit they abort."""


def end_on_sigterm() -> None:
    """From now on SIGTERM is an orderly end, as Ctrl-C is."""
    signal.signal(signal.SIGTERM, interrupt)


def end_at_once() -> None:
    """From now on signals do what they do by default: in the interpreter's own end an exception is only printed."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def interrupt(number: int, frame: object = None) -> NoReturn:
    """What a handler of a signal that ends the process does."""
    global _terminated
    _terminated = number == signal.SIGTERM
    raise Terminated if _terminated else KeyboardInterrupt


def status_of(end: SystemExit) -> int | str | None:
    """The status to exit with: whoever knows KeyboardInterrupt only takes SIGTERM for Ctrl-C."""
    return 128 + signal.SIGTERM if _terminated and end.code == INTERRUPTED else end.code


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that end the process do so when the block has ended; handlers that Ray sets for them within count not."""
    global _waiting
    if _waiting or threading.current_thread() is not threading.main_thread():  # only there do handlers run
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda sig, _: came.append(sig)) for number in ENDING}
    set_handler, _waiting = signal.signal, True
    signal.signal = _ignoring(set_handler)
    try:
        yield
    finally:
        signal.signal, _waiting = set_handler, False
        for own, handler in before.items():
            signal.signal(own, handler if handler is not None else signal.SIG_DFL)
        for number in came[:1]:
            signal.raise_signal(number)


def _ignoring(set_handler: Any) -> Any:
    """`signal.signal`, in vain for the signals that wait."""

    def set_other(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in ENDING else set_handler(number, handler)

    return set_other


class Undo(ExitStack):
    """An ExitStack that no signal keeps from undoing everything."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        with signals_wait():
            return super().__exit__(kind, error, trace)
