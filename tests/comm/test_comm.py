"""Every Communicator against torch on random data: the single rank, gloo between processes, and their errors."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

from lockstep.comm.base import Communicator, SingleRank
from lockstep.comm.message_text import first_line

from comm_failures import error_of
from rank_processes import run_processes
from ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


def everything(comm: Communicator) -> dict[str, Any]:
    """Run all collectives on random data; returns whether each result is exact, by name."""
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for shape in [(0,), (1,), (3, 5), (4, 257), (8, 1024)]:
            # Small integers: exact in every dtype, so the sum must be bit-equal in any order.
            def make(rank: int, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                random = torch.Generator().manual_seed(rank + sum(shape))
                return torch.randint(-8, 8, shape, generator=random).to(dtype)

            every = torch.stack([make(rank, *shape) for rank in range(comm.size)])
            mine = make(comm.rank, *shape)
            key = f"{dtype} {shape}"
            found[f"all_gather {key}"] = torch.equal(comm.all_gather(mine), every)
            found[f"all_gather strided {key}"] = torch.equal(
                comm.all_gather(mine.t()) if mine.dim() == 2 else every, every.mT if mine.dim() == 2 else every
            )
            found[f"all_reduce {key}"] = torch.equal(comm.all_reduce(mine), every.sum(0).to(dtype))
    comm.barrier()
    return found


def fused_norm(comm: Communicator) -> torch.Tensor:
    """Run all-reduce + residual + RMSNorm; returns norm and residual."""
    torch.manual_seed(comm.rank)
    x, residual = torch.randn(5, 64), torch.ones(5, 64)
    out = comm.all_reduce_add_rms_norm(x, residual, torch.full((64,), 2.0), 1e-5)
    return torch.stack((out, residual))


def same_bits(comm: Communicator) -> list[bytes]:
    """Return the bytes of float sums, which depend on the order of addition."""
    torch.manual_seed(comm.rank)
    return [comm.all_reduce(torch.randn(n)).numpy().tobytes() for n in (1, 7, 1000, 100_003)]


def many_with_a_laggard(comm: Communicator) -> bool:
    ok = True
    for i in range(500):
        if comm.rank == 1 and i % 100 == 0:
            time.sleep(0.02)
        ok &= bool(
            (comm.all_reduce(torch.full((17,), float(i + comm.rank))) == comm.size * i + sum(range(comm.size))).all()
        )
    comm.close()
    return ok and (comm.rank == 1 or comm.host_s > 0.05)  # rank 0 has waited 0.1 s


def dies(comm: Communicator) -> tuple[str, float]:
    """Kill rank 1; returns the error of rank 0, and the seconds until it came."""
    if comm.rank == 1:
        comm.all_reduce(torch.ones(1 << 20))  # until rank 0 has connected, too
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.perf_counter()
    message = error_of(lambda: [comm.all_reduce(torch.ones(1 << 20)) for _ in range(2)])
    return message, time.perf_counter() - started


def never_arrives(comm: Communicator) -> str:
    return "" if comm.rank == 1 else error_of(lambda: comm.all_reduce(torch.ones(8)))


def test_single_rank() -> None:
    assert all(everything(SingleRank()).values())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_thread_ranks_of_the_tests_are_communicators(size: int) -> None:
    for found in run_ranks(size, everything):
        assert all(found.values()), [name for name, ok in found.items() if not ok]


@pytest.mark.parametrize("size", [2, 3, pytest.param(8, marks=pytest.mark.nightly)])
def test_gloo_collectives_against_torch(size: int) -> None:
    for found in run_processes(size, everything):
        assert all(found.values()), [name for name, ok in found.items() if not ok]


def test_gloo_all_reduce_add_rms_norm() -> None:
    first, second = run_processes(2, fused_norm)
    partials = []
    for rank in range(2):
        torch.manual_seed(rank)
        partials.append(torch.randn(5, 64))
    residual = partials[0] + partials[1] + 1
    expected = torch.nn.functional.rms_norm(residual, (64,), torch.full((64,), 2.0), 1e-5)
    torch.testing.assert_close(first, torch.stack((expected, residual)), rtol=1e-6, atol=1e-6)
    assert torch.equal(first, second)


def test_gloo_sums_are_bitwise_identical_on_all_ranks() -> None:
    first, *others = run_processes(3, same_bits)
    assert all(other == first for other in others)


def test_gloo_with_a_slow_rank() -> None:
    assert run_processes(2, many_with_a_laggard) == [True, True]


def test_collective_fails_when_a_peer_dies() -> None:
    (message, seconds), dead = run_processes(2, dies)
    assert dead is None
    assert "rank 0 of 2: all_reduce failed" in message
    assert "\n" not in message
    assert seconds < 25, "before the deadline of 30 s"


def test_collective_fails_at_its_deadline_when_a_peer_is_silent() -> None:
    message, _ = run_processes(2, never_arrives, timeout_s=2.0)
    assert "took longer than 2 s" in message


def test_first_line_of_an_error() -> None:
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(RuntimeError("\n  two \n")) == "two"
    assert first_line(KeyError()) == "KeyError"
