"""Waiting for another thread or process, with a deadline that a busy machine does not reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 60.0


def holds_within(timeout_s: float, holds: Callable[[], object]) -> bool:
    """Return whether the condition holds within `timeout_s`; return as soon as it does."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_until(holds: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until the condition holds; fail after `timeout_s`."""
    assert holds_within(timeout_s, holds), f"the condition did not hold within {timeout_s:g} s"


def left_after(find: Callable[[], T], timeout_s: float = PATIENCE_S) -> T:
    """Return what `find` still returns after at most `timeout_s`; return as soon as it finds nothing."""
    deadline = time.monotonic() + timeout_s
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
