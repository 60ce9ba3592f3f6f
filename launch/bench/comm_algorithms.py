"""What `lockstep bench comm` times, each algorithm under one interface: ours, NCCL's, and those of others (others.py).

An algorithm is offered a number of elements and says how it adds them up over the ranks. Those that complete the
residual stream, an all-reduce + residual + RMSNorm, take them as rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...comm.nccl import NcclCommunicator, Window
from ...comm.symmetric import SymmetricCommunicator

EPS = 1e-5


class Unavailable(RuntimeError):
    """An algorithm cannot run here; the message is the reason, for people."""


@dataclass(frozen=True)
class Case:
    """A collective of one size: `call()` queues it on whatever there is, `call(x)` on these values [count].

    The results follow in the order of `expected`; `captured` is called after each capture of calls in a graph.
    """

    call: Callable[[Tensor | None], Sequence[Tensor]]
    captured: Callable[[], None] = lambda: None


class Algorithm(ABC):
    """One way of adding up, on one rank."""

    name: str
    fused = False  # all-reduce + residual + RMSNorm
    capturable = True

    @abstractmethod
    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        """A collective of `count` elements, None where there is no such one.

        In place: the result overwrites the input; where it never does (ours, FlashInfer's, torch's symmetric memory),
        the input lies in the shared memory already, as a product leaves it there.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what it holds; collective."""


class Plain(Algorithm):
    """`comm.all_reduce`, of any communicator."""

    def __init__(self, name: str, comm: Communicator, device: torch.device) -> None:
        self.name, self.comm, self.device = name, comm, device
        self.capturable = comm.capturable

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        x = torch.zeros(count, dtype=dtype, device=self.device)
        if isinstance(self.comm, NcclCommunicator) and not in_place:
            return _copied(x, lambda: self.comm.all_reduce(x, torch.empty_like(x)))  # type: ignore[call-arg]
        return _copied(x, lambda: self.comm.all_reduce(x)) if in_place else None


class Ours(Algorithm):
    """`comm.all_reduce` through shared memory, of a communicator that knows one algorithm only."""

    def __init__(self, name: str, comm: SymmetricCommunicator, device: torch.device) -> None:
        self.name, self.comm, self.device = name, comm, device

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        if self.comm.buffer(1, count, dtype) is None:
            return None
        elsewhere = torch.zeros(count, dtype=dtype, device=self.device)

        def call(values: Tensor | None) -> list[Tensor]:
            x = self.comm.buffer(1, count, dtype) if in_place else elsewhere
            assert x is not None
            if values is not None:
                x.view(-1).copy_(values)
            return [self.comm.all_reduce(x).view(-1)]

        return Case(call)


class Completion(Algorithm):
    """`comm.all_reduce_add_rms_norm` of rows of `columns`: one kernel where the communicator has it, else two."""

    fused = True

    def __init__(self, name: str, comm: Communicator, device: torch.device, columns: int) -> None:
        self.name, self.comm, self.device, self.columns = name, comm, device, columns
        self.capturable = comm.capturable

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        ours = isinstance(self.comm, SymmetricCommunicator)
        rows, columns = shape_of(count, self.columns)
        if ours and self.comm.buffer(rows, columns, dtype) is None:
            return None
        if not ours and not in_place:
            return None
        start, weight = completion_inputs(count, self.columns, dtype, self.device)
        residual, elsewhere = start.clone(), torch.zeros_like(start)

        def call(values: Tensor | None) -> list[Tensor]:
            x = self.comm.buffer(rows, columns, dtype) if ours and in_place else elsewhere
            assert x is not None
            if values is not None:
                x.copy_(values.view(rows, columns))
                residual.copy_(start)
            norm = self.comm.all_reduce_add_rms_norm(x, residual, weight, EPS)
            return [residual.view(-1), norm.view(-1)]

        return Case(call)


class NcclWindow(Algorithm):
    """NCCL's symmetric kernels, which read and write memory that all ranks have registered."""

    name = "nccl window"

    def __init__(self, comm: NcclCommunicator, max_bytes: int, device: torch.device) -> None:
        from ...kernels import peer_memory

        self.comm = comm
        self._window: Window = comm.window(2 * max_bytes)
        self._bytes = peer_memory.view(self._window.address, 2 * max_bytes, device.index or 0).zero_()

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        source, target = (half[: count * dtype.itemsize].view(dtype) for half in self._bytes.chunk(2))
        out = source if in_place else target
        return _copied(source, lambda: self.comm.all_reduce(source, out))

    def close(self) -> None:
        del self._bytes
        self.comm.free(self._window)


def shape_of(count: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a stream of `count` elements; one shorter row where there are few."""
    return (count // columns, columns) if count >= columns else (1, count)


def completion_inputs(count: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The residual stream before [T, D], and the weight of the norm [D]; the same on every rank."""
    random = torch.Generator(device).manual_seed(count)
    shape = shape_of(count, columns)
    residual = torch.randn(shape, generator=random, device=device).to(dtype)
    return residual, torch.randn(shape[1], generator=random, device=device).to(dtype)


def _copied(x: Tensor, collective: Callable[[], Tensor]) -> Case:
    def call(values: Tensor | None) -> list[Tensor]:
        if values is not None:
            x.copy_(values)
        return [collective()]

    return Case(call)
