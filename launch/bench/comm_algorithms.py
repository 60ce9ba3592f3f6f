"""The all-reduces that `lockstep bench comm` times over lockstep's communicators, behind one interface.

An algorithm sums a number of elements over the ranks. Fused algorithms, all-reduce + residual + RMSNorm, take the
elements as rows. The algorithms of other libraries are in comm_baselines.py and flashinfer_all_reduce.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...comm.nccl import NcclCommunicator

EPS = 1e-5


class Unavailable(RuntimeError):
    """An algorithm cannot run here; the message is the reason."""


@dataclass(frozen=True)
class TimedCall:
    """A collective of one size: `call(None)` queues it on any values, `call(x)` on the values x [count].

    `call` returns the result, or the residual stream and its norm. `on_captured` follows each capture in a graph.
    """

    call: Callable[[Tensor | None], Sequence[Tensor]]
    on_captured: Callable[[], None] = lambda: None


class AllReduceAlgorithm(ABC):
    """One way to sum over the ranks, on one rank."""

    name: str
    fused = False  # all-reduce + residual + RMSNorm
    capturable = True

    @abstractmethod
    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        """Return the collective of `count` elements, or None if there is none.

        In place: the result overwrites the input. Algorithms over shared memory never do that: for them, the input
        lies in the shared memory already, where a GEMM writes it.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what it holds; collective."""


class CommunicatorAllReduce(AllReduceAlgorithm):
    """`all_reduce` of a communicator.

    has_buffers  the communicator is meant for its buffers: sizes without one are left out
    """

    def __init__(self, name: str, comm: Communicator, device: torch.device, *, has_buffers: bool = False) -> None:
        self.name, self.comm, self.device, self.has_buffers = name, comm, device, has_buffers
        self.capturable = comm.capturable

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        comm, x = self.comm, torch.zeros(count, dtype=dtype, device=self.device)
        if self.has_buffers:
            return self._prepare_buffer(x, in_place=in_place)
        if in_place:
            return on_values(x, lambda: comm.all_reduce(x))
        if isinstance(comm, NcclCommunicator):
            return on_values(x, lambda: comm.all_reduce(x, torch.empty_like(x)))
        return None

    def _prepare_buffer(self, ordinary: Tensor, *, in_place: bool) -> TimedCall | None:
        count, dtype = len(ordinary), ordinary.dtype
        if self.comm.buffer(1, count, dtype) is None:
            return None

        def call(values: Tensor | None) -> list[Tensor]:
            x = self.comm.buffer(1, count, dtype) if in_place else ordinary
            assert x is not None
            if values is not None:
                x.view(-1).copy_(values)
            return [self.comm.all_reduce(x).view(-1)]

        return TimedCall(call)


class AllReduceAndNorm(AllReduceAlgorithm):
    """`all_reduce_add_rms_norm` of rows of `columns`: one kernel with buffers, else an all-reduce and a norm."""

    fused = True

    def __init__(
        self, name: str, comm: Communicator, device: torch.device, columns: int, *, has_buffers: bool = False
    ) -> None:
        self.name, self.comm, self.device, self.columns, self.has_buffers = name, comm, device, columns, has_buffers
        self.capturable = comm.capturable

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        rows, columns = shape_of(count, self.columns)
        if self.has_buffers and self.comm.buffer(rows, columns, dtype) is None:
            return None
        if not self.has_buffers and not in_place:
            return None
        initial, weight = norm_inputs(count, self.columns, dtype, self.device)
        residual, ordinary = initial.clone(), torch.zeros_like(initial)

        def call(values: Tensor | None) -> list[Tensor]:
            x = self.comm.buffer(rows, columns, dtype) if self.has_buffers and in_place else ordinary
            assert x is not None
            if values is not None:
                x.copy_(values.view(rows, columns))
                residual.copy_(initial)
            norm = self.comm.all_reduce_add_rms_norm(x, residual, weight, EPS)
            return [residual.view(-1), norm.view(-1)]

        return TimedCall(call)


class NcclWindowAllReduce(AllReduceAlgorithm):
    """NCCL's symmetric kernels, on memory that all ranks have registered."""

    name = "nccl window"

    def __init__(self, comm: NcclCommunicator, max_bytes: int, device: torch.device) -> None:
        from ...kernels import peer_memory

        self.comm = comm
        self._window = comm.allocate_window(2 * max_bytes)
        self._bytes = peer_memory.view(self._window.address, 2 * max_bytes, device.index or 0).zero_()

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        source, target = (half[: count * dtype.itemsize].view(dtype) for half in self._bytes.chunk(2))
        out = source if in_place else target
        return on_values(source, lambda: self.comm.all_reduce(source, out))

    def close(self) -> None:
        del self._bytes
        self.comm.free_window(self._window)


def on_values(x: Tensor, collective: Callable[[], Tensor]) -> TimedCall:
    """Return the call of a collective that reads x, into which new values are copied."""

    def call(values: Tensor | None) -> list[Tensor]:
        if values is not None:
            x.copy_(values)
        return [collective()]

    return TimedCall(call)


def shape_of(count: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) of a stream of `count` elements; fewer than `columns` make one shorter row."""
    return (count // columns, columns) if count >= columns else (1, count)


def norm_inputs(count: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the residual stream before the sum [T, D] and the norm's weight [D]; the same on every rank."""
    generator = torch.Generator(device).manual_seed(count)
    shape = shape_of(count, columns)
    residual = torch.randn(shape, generator=generator, device=device).to(dtype)
    return residual, torch.randn(shape[1], generator=generator, device=device).to(dtype)
