"""Failures of a group: the error of a call, and the loss of a rank on a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from lockstep.comm.base import CommError, Communicator
from lockstep.comm.nccl import NcclCommunicator

IMPATIENCE_S = 1.5


def error_of(call: Callable[[], Any]) -> str:
    """Return the message of the CommError that the call raises."""
    try:
        call()
    except CommError as error:
        return str(error)
    return "no error"


def be_impatient(comm: Any) -> None:
    """Shorten the deadline of collectives, which compiling and joining need longer."""
    if isinstance(comm, NcclCommunicator):
        comm._timeout_s = IMPATIENCE_S
    else:
        comm.set_timeout(IMPATIENCE_S)


def lose_last_rank(comm: Communicator, when: str, how: str, in_graph: bool) -> tuple[list[str], float, float]:
    """Kill or stop the last rank; return the error of the others, its delay, and how long the GPU was busy."""
    x = torch.ones(4096, device="cuda")
    graph = torch.cuda.CUDAGraph()
    comm.all_reduce(x)
    torch.cuda.synchronize()
    if in_graph:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(20):
                comm.all_reduce(x)
    work = graph.replay if in_graph else lambda: comm.all_reduce(x)
    comm.barrier()
    be_impatient(comm)
    if when == "after":
        work()
    torch.cuda.synchronize()  # a process that is killed with work in flight takes the MPS server along
    if comm.rank == comm.size - 1:
        time.sleep(0.5 if when == "during" else 0)
        subprocess.Popen(["sh", "-c", f"sleep 6; kill -KILL {os.getpid()}"])  # what is stopped must end as well
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    time.sleep(0 if when == "during" else 0.5)
    started = time.monotonic()

    def survive() -> None:
        work()
        done = torch.cuda.Event()
        done.record()
        comm.wait(done)

    told = [error_of(survive), error_of(lambda: comm.all_reduce(x))]
    told_s = time.monotonic() - started
    torch.cuda.synchronize()
    return told, told_s, time.monotonic() - started
