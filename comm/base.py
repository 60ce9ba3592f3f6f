"""The collectives of one tensor-parallel group, as an interface, and the group of a single rank.

A communicator is passed as an argument and is never global. Several ranks can then live in one process, and tensor
parallelism is unit-tested on a CPU. Every call is collective: all ranks make the same calls in the same order, with the
same shapes and dtypes. A rank raises CommError if a peer does not arrive before the deadline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.arguments import Matrix, Rows


class CommError(RuntimeError):
    """A collective failed or timed out; the message names the rank, the operation and the cause."""


class PeerMemoryUnavailable(RuntimeError):
    """The ranks cannot map each other's GPU memory; the message is the reason, after an agreement equal on all."""


class Communicator(ABC):
    """One rank of a group of `size` ranks."""

    rank: int
    size: int
    description: str  # the implementation in use and the reason, for the log
    capturable: bool  # True if a CUDA graph can capture the collectives
    uses_rendezvous = False  # True if the rendezvous must stay open until `close`
    host_s = 0.0  # time that the host has spent in collectives; those of a GPU take none

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over the ranks, bitwise identical on each; x is consumed and may be the result."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """Return x of every rank, in rank order: [...] -> [size, ...]."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Add the sum of x over the ranks to `residual` in place and return its RMSNorm.

        x, residual  [T, D]; x is consumed
        weight       [D]
        """
        return ops.add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Return memory for the input of the next collective, which then is not copied; None if any memory will do."""
        return None

    def gemms_push(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        """Return whether sums of `linear` of this shape are pushed, by the GEMMs that can; equal on all ranks."""
        return False

    def linear(self, x: Rows, weight: Matrix, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
        """Return `x @ weight^T + bias` as the partial sum of the next collective, an all_reduce_add_rms_norm.

        That call must follow, and nothing else may use the result: it may stand for what a GEMM has sent to the peers.
        x       [T, K]; K may differ between the ranks
        weight  [D, K]
        """
        out = self.buffer(len(x), weight.shape[0], x.dtype)
        return ops.linear(x, weight, bias, out=out, batch_invariant=batch_invariant)

    def wait(self, done: torch.cuda.Event) -> None:
        """Return once the device has reached `done`; raises CommError if a peer does not arrive before the deadline."""
        done.synchronize()

    def abort(self) -> None:  # noqa: B027 - an implementation without anything to interrupt needs no override
        """End a collective that waits for a peer, from another thread; the group is unusable afterwards."""

    def close(self) -> None:  # noqa: B027
        """Free the group's resources. Call it on every rank, with no collective in flight."""


class SingleRank(Communicator):
    """The group of one rank: every collective is the identity."""

    rank = 0
    size = 1
    description = "single rank, no communication"
    capturable = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def barrier(self) -> None:
        return
