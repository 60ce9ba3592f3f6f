"""Ranks as processes: a function of the test runs on each of them with a communicator between them.

Ranks are forks of a server that has imported torch, which takes seconds. Those on a CPU are kept from one test to the
next. Those on GPUs are new ones each time: a process keeps its CUDA context and its libnccl until it ends.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
from ray import cloudpickle

from lockstep.comm.base import CommError, Communicator
from lockstep.comm.connect import connect
from lockstep.comm.rendezvous import RankStore

Job = Callable[[Communicator], Any]
LINGER_S = 30.0
PLACES = ((2, 2), (3, 3), (4, 4), (8, 8), (2, 1), (4, 1), (4, 2))  # (ranks, GPUs) of the tests on GPUs
place_id = "{0[0]}-on-{0[1]}".format
FORKS = multiprocessing.get_context("forkserver")  # its server has imported torch, and no CUDA context
FORKS.set_forkserver_preload([__name__])


class RankProcess:
    """A process that computes one rank of one group after another."""

    def __init__(self) -> None:
        self.connection, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def receive(self, patience_s: float) -> Any:
        """Return what the process sends next; None if it has died."""
        assert wait([self.connection, self.process.sentinel], patience_s), "a rank hangs; where is on stderr"
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            print(f"rank process {self.process.pid} has ended with exit code {self.process.exitcode}")
            return None

    def end(self) -> None:
        """Let the process end by itself, or kill it."""
        self.connection.close()
        self.process.join(10)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        assert not self.process.is_alive(), f"rank process {self.process.pid} has not ended 10 s after it was killed"


_idle: list[RankProcess] = []


def run_processes(
    size: int,
    job: Job,
    timeout_s: float = 30.0,
    patience_s: float = 90.0,
    device: str = "cpu",
    each: Sequence[dict[str, Any]] = (),
    **options: Any,
) -> list[Any]:
    """Return `job(communicator)` of `size` processes in rank order, None for one that died.

    `options` go to `connect`, those of `each` on their rank only. A rank that has not answered after patience_s fails
    the test; none that may still be at work is left behind.
    """
    keep = device == "cpu"
    ranks = [_idle.pop() if keep and _idle else RankProcess() for _ in range(size)]
    options = {"device": device, "tell_after_s": patience_s - 5, "timeout_s": timeout_s, **options}
    function = _by_value(job)
    idle = False
    try:
        for rank, process in enumerate(ranks):
            process.connection.send((rank, size, function, options | (dict(each[rank]) if each else {})))
        addresses = [process.receive(patience_s) for process in ranks]
        for process in ranks:
            process.connection.send(addresses)
        results = [process.receive(patience_s) for process in ranks]
        for process in ranks:
            if process.is_alive:
                process.connection.send("all have answered")
        idle = keep
    finally:
        for process in ranks:
            if idle and process.is_alive:
                _idle.append(process)
            elif idle or process.process.exitcode is not None or not keep:
                process.end()
            else:
                process.kill()
    return results


def _by_value(job: Job) -> bytes:
    """Pickle a function of a test module, which another process cannot import."""
    module = sys.modules[getattr(job, "func", job).__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(job))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _serve(requests: Connection) -> None:
    """Answer requests until their sender closes the connection."""
    torch.set_num_threads(1)
    while True:
        try:
            request = requests.recv()
        except EOFError:
            return
        _run(requests, *request)


def _run(requests: Connection, rank: int, size: int, function: bytes, options: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(options.pop("tell_after_s"), exit=False)  # where this rank waits
    timeout_s = options.pop("timeout_s")
    store = RankStore("127.0.0.1")
    requests.send(store.address)
    store.join(rank, requests.recv(), timeout_s)
    device = torch.device(options.pop("device"))
    gpus = options.pop("gpus", size)
    if device.type == "cuda":
        device = torch.device("cuda", rank % gpus)
        torch.cuda.set_device(device)
    try:
        comm = connect(rank, size, store=store, own_ip="127.0.0.1", device=device, timeout_s=timeout_s, **options)
        requests.send(cloudpickle.loads(function)(comm))
    except CommError as error:
        requests.send(error)
    if requests.poll(LINGER_S):  # a rank that leaves closes connections that the others may still be using
        requests.recv()
    faulthandler.cancel_dump_traceback_later()
    comm = None  # type: ignore[assignment]
    store.close()
    gc.collect()


def on_gpus(size: int, gpus: int) -> dict[str, Any]:
    """Return how to connect so many processes on so many GPUs, or skip with the reason why that is impossible here."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA devices, this machine has {torch.cuda.device_count()}")
    if size <= gpus:
        return {"device": "cuda"}
    path = os.environ.get("GPU_TEST_LIBNCCL")
    if path is None:
        pytest.skip("GPU_TEST_LIBNCCL, the path of a libnccl that lets ranks share a GPU, is not set")
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("NCCL_MULTI_RANK_GPU_ENABLE is not 1")
    return {"device": "cuda", "gpus": gpus, "shares_device": True, "library": path}
