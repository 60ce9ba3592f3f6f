"""The duration of a collective on this rank in microseconds: called from Python, and in a CUDA graph of many calls.

All ranks time the same calls together. A failed wait raises the communicator's error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from ..kernels import graph_capture
from .base import Communicator

log = logging.getLogger(__name__)
IMPORT_THREAD = "lockstep-import"  # the name of threads that import modules ahead of their use
IMPORTS_END_S = 60.0


def eager_us(comm: Communicator, call: Callable[[], object], *, warmup: int, times: int, cuda: bool) -> float:
    """Return the time per call of `times` calls in a row, including the end of the last one."""
    for _ in range(warmup):
        call()
    if cuda:
        synchronize(comm)
    comm.barrier()
    started = time.perf_counter()
    for _ in range(times):
        call()
    if cuda:
        synchronize(comm)
    return (time.perf_counter() - started) * 1e6 / times


def graph_us(
    comm: Communicator,
    call: Callable[[], object],
    *,
    length: int,
    times: int,
    rounds: int = 1,
    on_captured: Callable[[], None] = lambda: None,
) -> float:
    """Return the time per call in a graph of `length` calls that is replayed `times` times: the best of `rounds`.

    A rank that launches late delays the others, whose collectives wait for it. So each round begins with a replay that
    is not timed: all ranks leave it together.

    call         has been called before
    on_captured  is called once, between the capture and the first replay
    """

    def several() -> None:
        for _ in range(length):
            call()  # its result is freed: the next call may have the same memory

    graph = capture(several)
    on_captured()
    return min(_replay_us(comm, graph, times) for _ in range(rounds)) / length


def _replay_us(comm: Communicator, graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Return the time per replay of `times` replays, after one that is not timed."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    comm.barrier()
    graph.replay()
    started.record()
    for _ in range(times):
        graph.replay()
    ended.record()
    comm.wait(ended)
    return float(started.elapsed_time(ended)) * 1e3 / times


def wait_for_imports() -> None:
    """Wait for the threads that import modules: they keep the interpreter, so that launches are milliseconds late.

    A rank that launches late delays the collectives of all ranks.
    """
    for thread in threading.enumerate():
        if thread.name == IMPORT_THREAD:
            thread.join(IMPORTS_END_S)
            if thread.is_alive():
                log.warning("timing while modules are imported: that has not ended after %.0f s", IMPORTS_END_S)


def capture(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return a graph of the kernels that `launch` queues."""
    graph = torch.cuda.CUDAGraph()
    with graph_capture.capture(graph):
        launch()
    return graph


def synchronize(comm: Communicator) -> None:
    """Wait, with the communicator's deadline, for the work that this rank has queued on its GPU."""
    done = torch.cuda.Event()
    done.record()
    comm.wait(done)
