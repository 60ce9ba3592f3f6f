"""RMSNorm, the residual stream, and the place where tensor parallelism adds up.

The layers before a norm add to the residual stream. One rank alone does so within its product, and leaves the norm to
the product that follows; of several, each has a partial sum, which the norm completes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .weights import Piece, Weights


def norm_weight(weights: Weights, name: str, size: int) -> Tensor:
    """The weight [size] of a norm, the same on each rank."""
    return weights.add((size,), [Piece(name, (size,))], is_norm=True)


@dataclass
class Residual:
    """The residual stream [T, D] of one step, updated in place, and what is still to be added to it."""

    total: Tensor
    partial: Tensor | None = None  # [T, D]; summed over the ranks it is the last layer's result


@dataclass(frozen=True)
class Normed:
    """Rows [T, D] that are to be normalized by whoever reads them; without a weight they are already."""

    x: Tensor
    weight: Tensor | None = None
    eps: float = 0.0

    def tensor(self) -> Tensor:
        """The normalized rows, for a reader that is not a product."""
        return self.x if self.weight is None else ops.rms_norm(self.x, self.weight, self.eps)


class RMSNorm:
    """Completes the residual stream, and normalizes that."""

    def __init__(self, weights: Weights, comm: Communicator, name: str, size: int, eps: float) -> None:
        self.weight = norm_weight(weights, f"{name}.weight", size)
        self.eps = eps
        self.comm = comm

    def __call__(self, residual: Residual) -> Normed:
        """The norm of the stream, in which nothing is left to add."""
        partial, residual.partial = residual.partial, None
        if partial is None:
            return Normed(residual.total, self.weight, self.eps)
        return Normed(self.comm.all_reduce_add_rms_norm(partial, residual.total, self.weight, self.eps))
