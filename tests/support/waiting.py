"""Waiting for another thread or process, with a deadline that a busy machine does not reach."""

from __future__ import annotations

import socket
import threading
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


def join(thread: threading.Thread, timeout_s: float = PATIENCE_S) -> None:
    """Wait until the thread has ended; fail after `timeout_s`."""
    thread.join(timeout_s)
    assert not thread.is_alive(), f"the thread {thread.name} has not ended within {timeout_s:g} s"


def read_to_end(raw: socket.socket, timeout_s: float = PATIENCE_S) -> bytes:
    """Return what arrives until the other side is closed; fail after `timeout_s`, also while something arrives."""
    received, deadline = b"", time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        raw.settimeout(left)
        try:
            piece = raw.recv(1 << 16)
        except TimeoutError:
            break
        if not piece:
            return received
        received += piece
    raise AssertionError(f"the other side was not closed within {timeout_s:g} s; it sent {received[-200:]!r}")
