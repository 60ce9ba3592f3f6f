"""What the ranks of one tensor-parallel group can ask of each other.

A communicator is an argument of whoever needs it, never a global: several ranks can then live in one process, and
tensor parallelism is unit-tested on a CPU. Every call is collective: all ranks make the same calls in the same order,
with the same shapes and dtypes. A rank whose peer does not arrive in time gets a CommError that says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..kernels import ops


class CommError(RuntimeError):
    """A collective failed or timed out; the message names the rank, the operation and what it waited for."""


class Communicator(ABC):
    """One rank's end of a group of `size` ranks."""

    rank: int
    size: int
    description: str  # for the log: which implementation was chosen and why
    capturable: bool  # in a CUDA graph

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, the same bits on each; x is consumed and may be the result."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, in rank order: [...] -> [size, ...]."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Row `rank` of the sum of x over the ranks: [size, ...] -> [...]; x is consumed."""

    @abstractmethod
    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """x of rank `root`, written into x on the others; returns x."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`residual += sum of x over the ranks` in place, then RMSNorm of it [T, D]; x [T, D] is consumed."""
        return ops.add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Where the input of the next collective may be written, so that it need not be copied; None: anywhere."""
        return None

    def wait(self, done: torch.cuda.Event) -> None:
        """Returns once the device has reached `done`; raises CommError where that waits for a peer in vain."""
        done.synchronize()

    def abort(self) -> None:  # noqa: B027 - an implementation without anything to interrupt needs no override
        """End a collective that waits for a peer, from another thread; the group is unusable afterwards."""

    def close(self) -> None:  # noqa: B027
        """Free what the group holds. Call it on every rank, with no collective in flight."""


class SingleRank(Communicator):
    """The group of one: every collective is the identity."""

    rank = 0
    size = 1
    description = "single rank, no communication"
    capturable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x[0]

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return x

    def barrier(self) -> None:
        return
