"""Threads that wake up late, where nobody waits for them: an idle process then costs less."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30  # <linux/prctl.h>


@contextmanager
def coarse_timers(seconds: float) -> Iterator[None]:
    """Threads that this thread starts within may come up to `seconds` late out of every timed wait of their lives.

    An event that they wait for wakes them at once, as ever. Linux; elsewhere nothing changes.
    """
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    before = prctl(PR_GET_TIMERSLACK)
    prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(int(seconds * 1e9)))
    try:
        yield
    finally:
        prctl(PR_SET_TIMERSLACK, ctypes.c_ulong(before))
