"""Captures of CUDA graphs that neither garbage collection nor other threads can end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_pauses = 0  # blocks of paused_collection, of all threads
_was_enabled = False  # before the first of them


@contextmanager
def paused_collection() -> Iterator[None]:
    """Let no garbage collection begin in the block, in any thread.

    A collection during a capture may free another CUDA graph, a module or memory. CUDA then ends the capture.
    """
    global _pauses, _was_enabled
    with _lock:
        if not _pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _was_enabled and not _pauses:
                gc.enable()


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture the block into `graph`, with options of torch.cuda.graph; other threads may use CUDA meanwhile."""
    with paused_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
        yield
