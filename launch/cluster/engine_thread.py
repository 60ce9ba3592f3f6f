"""The thread that drives an executor, and the commands that other threads post to it."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ...comm.message_sockets import WakeupEvent

WAIT_S = 60.0  # longest wait for a step; the wakeup event and the executor's deadline come earlier


class EngineDriver(Protocol):
    """The work of an EngineThread, which calls all of these methods."""

    @property
    def busy(self) -> bool:
        """True while requests are live."""

    def poll(self, timeout_s: float) -> None:
        """Wait up to timeout_s for the executor's next results and pass them on."""

    def wait(self, wakeup: WakeupEvent) -> None:
        """While no request is live: wait until `wakeup` is set, or another `poll` is needed."""

    def on_failure(self, error: Exception) -> bool:
        """Handle what a command or `poll` raised; return whether the thread continues."""

    def detach(self) -> None:
        """Stop submitting to the executor; the remaining commands are called next, and then `close`."""

    def close(self) -> None:
        """End all requests and the executor; the last call."""


class EngineThread:
    """A thread that runs commands and polls an executor by turns, until `stop` or until the driver ends it."""

    def __init__(self, driver: EngineDriver, name: str, wakeup: WakeupEvent, shutting_down: threading.Event) -> None:
        self._driver, self._wakeup, self._shutting_down = driver, wakeup, shutting_down
        self._commands: deque[Callable[[], None]] = deque()
        self._is_waking = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Have `command` called in the thread; any other thread may call this."""
        self._commands.append(command)
        self._wake()

    def post_with_others(self, command: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Do as `post`, from a task of `loop`, and wake the thread once for all commands of one turn of the loop."""
        self._commands.append(command)
        if not self._is_waking:  # a wake-up passes the interpreter's lock to the thread and back
            self._is_waking = True
            loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        self._wakeup.set()

    def stop(self) -> None:
        """Let the thread end after its current turn, and wait for it; safe to call twice."""
        self._shutting_down.set()
        self._wakeup.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._shutting_down.is_set():
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001 - the driver logs it; an executor in this process raises any
                    if not self._driver.on_failure(error):
                        return
        finally:
            self._driver.detach()
            self._run_commands()
            self._driver.close()

    def _turn(self) -> None:
        self._run_commands()
        self._driver.poll(WAIT_S if self._driver.busy else 0.0)
        if not self._driver.busy:
            self._driver.wait(self._wakeup)
        self._wakeup.clear()  # loses no command: each is in the queue before the event is set

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()
