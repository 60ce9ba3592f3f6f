"""Captures of CUDA graphs that neither garbage collection nor other threads can end."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def paused_collection() -> Iterator[None]:
    """Let no garbage collection begin in the block, in any thread.

    A collection during a capture may free another CUDA graph, a module or memory. CUDA then ends the capture.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture the block into `graph`, with options of torch.cuda.graph; other threads may use CUDA meanwhile."""
    with paused_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
        yield
