"""Several ranks in one process: a communicator whose ranks are threads, so that tensor parallelism is a unit test.

It is strict where a real one would hang or give garbage: ranks that disagree on the operation, the shape or the dtype
are an error, a rank that does not arrive is an error, and what a collective consumes is overwritten. The sum of
`linear` has no elements until all_reduce_add_rms_norm gets it, as if a GEMM had sent it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from lockstep.comm.base import CommError, Communicator
from lockstep.kernels.arguments import Matrix

T = TypeVar("T")


class ThreadGroup:
    """The state that the threads share: a place for each rank's operation and tensor, and a barrier.

    turn  held by the rank that runs: threads that take the GIL from each other at each operation need several times as
          long; None if all of them run at once
    """

    def __init__(self, size: int, timeout_s: float = 60.0, turn: threading.Lock | None = None) -> None:
        self.size = size
        self.turn = turn
        self.offers: list[tuple[str, Tensor]] = [("nothing", torch.empty(0))] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)

    def rank(self, rank: int) -> ThreadRank:
        return ThreadRank(self, rank)


class ThreadRank(Communicator):
    """One rank's end; sums go in rank order, so they have the same bits on each rank."""

    description = "threads of one process, for tests"
    capturable = False

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = group.size
        self.sent: tuple[Tensor, Tensor] | None = None  # what `linear` has returned, and the product

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
        assert self.sent is None, "the sum before was not completed"
        product = super().linear(x, weight, bias, batch_invariant=batch_invariant)
        self.sent = torch.empty_like(product, device="meta"), product
        return self.sent[0]

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.sent is not None:
            (expected, product), self.sent = self.sent, None
            assert x is expected
            x = product
        return super().all_reduce_add_rms_norm(x, residual, weight, eps)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._exchange("all_reduce", x, _sum, consumes=True)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._exchange("all_gather", x, torch.stack)

    def barrier(self) -> None:
        self._exchange("barrier", torch.empty(0), lambda xs: xs[self.rank])

    def abort(self) -> None:
        self.group.barrier.abort()

    @contextmanager
    def others_run(self) -> Iterator[None]:
        """Let other ranks run within the block, which waits for them."""
        if self.group.turn is None:
            yield
            return
        self.group.turn.release()
        try:
            yield
        finally:
            self.group.turn.acquire()

    def _exchange(
        self, operation: str, x: Tensor, combine: Callable[[list[Tensor]], Tensor], *, consumes: bool = False
    ) -> Tensor:
        """`combine` of every rank's x; between the two waits nobody writes to what others read."""
        self.group.offers[self.rank] = (operation, x)
        self._wait(operation)
        calls = {(name, offer.shape, offer.dtype) for name, offer in self.group.offers}
        if len(calls) > 1:
            raise CommError(f"the ranks disagree: {calls}")
        result = combine([offer for _, offer in self.group.offers])
        self._wait(operation)
        if consumes:
            x.fill_(float("nan") if x.is_floating_point() else -1)
        return result

    def _wait(self, operation: str) -> None:
        try:
            with self.others_run():
                self.group.barrier.wait()
        except threading.BrokenBarrierError:
            raise CommError(f"rank {self.rank}: another rank failed or did not arrive at {operation}") from None


def run_ranks(size: int, fn: Callable[[ThreadRank], T], timeout_s: float = 60.0, *, in_turns: bool = True) -> list[T]:
    """`fn(communicator)` of `size` ranks; returns the results in rank order or raises the first error.

    in_turns  one rank runs at a time: `fn` waits for other ranks only in collectives and `others_run`
    """
    group = ThreadGroup(size, timeout_s, threading.Lock() if in_turns else None)

    def run(rank: ThreadRank) -> T:
        with group.turn or nullcontext():
            return fn(rank)

    with ThreadPoolExecutor(size) as threads:
        ranks = [threads.submit(run, group.rank(rank)) for rank in range(size)]
        finished, _ = wait(ranks, return_when=FIRST_EXCEPTION)
        for rank in finished:
            if rank.exception() is not None:
                group.barrier.abort()  # the others must not wait for it
                return [rank.result()]  # raises
    return [rank.result() for rank in ranks]


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total
