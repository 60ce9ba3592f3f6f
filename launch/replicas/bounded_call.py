"""Calls of Ray Serve's API with a deadline: Serve itself waits for its controller without one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from ..errors import RankFailed

CHECK_S = 0.5
Result = TypeVar("Result")


def bounded_call(name: str, call: Callable[[], Result], deadline: float, check: Callable[[], None]) -> Result:
    """Return the result of `call`, which runs in a thread that is left behind if it takes too long.

    Raises RankFailed with `name` at `deadline`, of time.perf_counter, and meanwhile what `check` raises.
    """
    result: Future[Result] = Future()
    threading.Thread(target=_run, args=(call, result), name="lockstep-serve", daemon=True).start()
    while not wait((result,), timeout=CHECK_S).done:
        check()
        if time.perf_counter() > deadline:
            reason = "the controller of Ray Serve has not answered within startup_timeout"
            raise RankFailed(f"{name}: {reason}; look at serve status, or raise it")
    return result.result()


def _run(call: Callable[[], Result], result: Future[Result]) -> None:
    try:
        result.set_result(call())
    except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
        result.set_exception(error)
