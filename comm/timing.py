"""Microseconds of a collective on this rank: called from Python, and within a CUDA graph of many.

All ranks time the same calls together. A wait that fails is the communicator's own error.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .base import Communicator


def eager_us(comm: Communicator, call: Callable[[], object], *, warmup: int, times: int, cuda: bool) -> float:
    """Of one of `times` calls in a row, the end of the last one included."""
    settled = settle if cuda else (lambda comm: None)
    for _ in range(warmup):
        call()
    settled(comm)
    comm.barrier()
    started = time.perf_counter()
    for _ in range(times):
        call()
    settled(comm)
    return (time.perf_counter() - started) * 1e6 / times


def graph_us(
    comm: Communicator,
    call: Callable[[], object],
    *,
    length: int,
    times: int,
    captured: Callable[[], None] = lambda: None,
) -> float:
    """Of one of `length` calls in a graph that is replayed `times` times; `call` has been called before.

    `captured` is called when the graph is there and has not been replayed.
    """
    graph = capture(lambda: [call() for _ in range(length)])
    captured()
    graph.replay()
    settle(comm)
    comm.barrier()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    comm.wait(ended)
    return float(started.elapsed_time(ended)) * 1e3 / (times * length)


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `work` launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def settle(comm: Communicator) -> None:
    """Wait, with the communicator's deadline, for what this rank has queued on its GPU."""
    done = torch.cuda.Event()
    done.record()
    comm.wait(done)
