"""Groups on GPUs that do not come together, or part in the middle of work: a named error, in time, and all is free.

Ranks that die or hang within a collective are in test_symmetric.py and test_nccl.py.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lockstep.comm.all_reduce_names import AllReduceChoice
from lockstep.comm.base import CommError, Communicator
from lockstep.comm.connect import connect
from lockstep.comm.rendezvous import RankStore

from comm_failures import be_impatient, error_of
from rank_processes import PLACES, on_gpus, place_id, run_processes

CHOICES = get_args(AllReduceChoice)
SPARE_BYTES = 64 << 20  # of what other processes do with the GPU


@pytest.fixture(params=[place for place in PLACES if place != (4, 1)], ids=place_id)
def places(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """(ranks, how to connect them): as processes on so many GPUs."""
    size, gpus = request.param
    return size, on_gpus(size, gpus)


def reached(comm: Communicator) -> None:
    done = torch.cuda.Event()
    done.record()
    comm.wait(done)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Compare the GPU's free memory before and after, unless tests in other processes use the GPU as well."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield
        return
    free = settled_free_bytes()
    yield
    assert settled_free_bytes() > free - SPARE_BYTES


def settled_free_bytes() -> int:
    """Free memory of GPU 0 once it no longer changes: what ends gives it back a little later."""
    free = -1
    for _ in range(50):
        before, free = free, torch.cuda.mem_get_info(0)[0]
        if free == before:
            return free
        time.sleep(0.2)
    return free


def leaves(comm: Communicator) -> tuple[int, float]:
    """Queues many collectives, in a graph and without, and closes at once; wrong results, and seconds it took."""
    x = torch.ones(1 << 20, device="cuda", dtype=torch.bfloat16)
    comm.all_reduce(x.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = [comm.all_reduce(x.clone()) for _ in range(20)]
    found = [comm.all_reduce(x.clone()) for _ in range(100)]
    for _ in range(5):
        graph.replay()
    del graph
    started = time.monotonic()
    comm.close()
    took_s = time.monotonic() - started
    return sum(int((y != comm.size).any()) for y in [*found, *captured]), took_s


def is_left(comm: Communicator) -> tuple[str, float]:
    """The last rank is killed; the others close with work in flight. Returns their error, and the seconds it took."""
    x = torch.ones(4096, device="cuda")
    comm.all_reduce(x.clone())
    reached(comm)
    comm.barrier()
    be_impatient(comm)
    torch.cuda.synchronize()  # a process that is killed with work in flight takes the MPS server along
    if comm.rank == comm.size - 1:
        time.sleep(0.2)  # the others may still be in the barrier that this rank has left
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.7)
    started = time.monotonic()
    said = error_of(partial(closes_with_work_in_flight, comm, x))
    torch.cuda.synchronize()
    return said, time.monotonic() - started


def closes_with_work_in_flight(comm: Communicator, x: Tensor) -> None:
    for _ in range(5):
        comm.all_reduce(x.clone())
    comm.close()


@pytest.mark.gpu
def test_a_peer_that_never_joins_is_named() -> None:
    store, silent = RankStore("127.0.0.1"), RankStore("127.0.0.1")
    store.join(0, [store.address, silent.address], 3.0)
    started = time.monotonic()
    with pytest.raises(CommError, match=r"^rank 0 of 2: no message within 3 s from rank 1$"):
        connect(0, 2, store=store, own_ip="127.0.0.1", device=torch.device("cuda", 0), timeout_s=3.0)
    assert time.monotonic() - started < 5


@pytest.mark.multigpu
def test_libraries_of_different_versions_are_refused_by_name_on_every_rank() -> None:
    path = os.environ.get("GPU_TEST_LIBNCCL")
    if path is None:
        pytest.skip("GPU_TEST_LIBNCCL, the path of another libnccl than torch's, is not set")
    found = run_processes(2, leaves, device="cuda", each=[{"library": None}, {"library": path}])
    for error in found:
        assert re.match(r"^the ranks differ: rank 0 has NCCL [\d.]+, rank 1 has NCCL [\d.]+; give all", str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES)
def test_close_finishes_what_is_in_flight(choice: str, places: tuple[int, dict[str, Any]]) -> None:
    size, options = places
    for wrong, took_s in run_processes(size, leaves, timeout_s=20, all_reduce=choice, **options):
        assert wrong == 0
        assert took_s < 10


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES)
def test_close_after_a_peer_has_died_ends_in_time(choice: str, places: tuple[int, dict[str, Any]]) -> None:
    """Two seconds of a collective's deadline, and three for each step of the parting that waits for the dead."""
    size, options = places
    *survivors, dead = run_processes(size, is_left, timeout_s=20, all_reduce=choice, **options)
    assert dead is None
    for survivor in survivors:
        assert isinstance(survivor, tuple), f"{survivor!r} before the peer has died"
        assert survivor[1] < 30, survivor
