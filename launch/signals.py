"""Blocks of code that Ctrl-C and SIGTERM do not interrupt.

An exception from a signal handler during torch's import aborts the process or is lost. During `ray.init` it leaves
servers behind that this process does not know; during a shutdown it leaves the rest behind. Blocking the signals with a
mask is no solution: processes that are started meanwhile inherit the mask.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM)
RESEND_S = 0.01
INTERRUPTED = 128 + signal.SIGINT
_waiting = False
_terminated = False


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception. It is a KeyboardInterrupt because Ray's waits abort the process on a SystemExit."""


def end_on_sigterm() -> None:
    """Let SIGTERM end the process in order from now on, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the entry point has set it for the time of the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = resend_dropped


def resend_dropped(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again if Python dropped its exception, as it does while a destructor runs."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
        timer = threading.Timer(RESEND_S, os.kill, (os.getpid(), number))  # in this call it would be dropped again
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


def end_at_once() -> None:
    """Restore the signals' default actions: during the interpreter's shutdown an exception is only printed."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def interrupt(number: int, frame: object = None) -> NoReturn:
    """Raise the exception for a signal that ends the process; a signal handler."""
    global _terminated
    _terminated = number == signal.SIGTERM
    raise Terminated if _terminated else KeyboardInterrupt


def status_of(end: SystemExit) -> int | str | None:
    """Return the exit status: code that knows KeyboardInterrupt only reports SIGTERM as Ctrl-C."""
    return 128 + signal.SIGTERM if _terminated and end.code == INTERRUPTED else end.code


@contextmanager
def signals_wait() -> Iterator[None]:
    """Delay signals that end the process until the block has ended; handlers that Ray sets meanwhile are ignored."""
    global _waiting
    if _waiting or threading.current_thread() is not threading.main_thread():  # only there do handlers run
        yield
        return
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda sig, _: received.append(sig)) for number in ENDING}
    set_handler, _waiting = signal.signal, True

    def set_other(number: Any, handler: Any) -> Any:
        return signal.getsignal(number) if number in ENDING else set_handler(number, handler)

    signal.signal = set_other  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal, _waiting = set_handler, False
        for number, handler in handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


class Undo(ExitStack):
    """An ExitStack whose callbacks are not interrupted by signals."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        with signals_wait():
            return super().__exit__(kind, error, trace)
