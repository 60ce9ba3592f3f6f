"""RMSNorm, and the place where tensor parallelism adds up.

The layers before a norm return partial sums; the norm completes them over the ranks, together with the residual.
"""

from __future__ import annotations

from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .weights import Piece, Weights


def norm_weight(weights: Weights, name: str, size: int) -> Tensor:
    """The weight [size] of a norm, the same on each rank."""
    return weights.add((size,), [Piece(name, (size,))], is_norm=True)


class RMSNorm:
    """Completes a partial sum, adds it to the residual stream, and normalizes that."""

    def __init__(self, weights: Weights, comm: Communicator, name: str, size: int, eps: float) -> None:
        self.weight = norm_weight(weights, f"{name}.weight", size)
        self.eps = eps
        self.comm = comm

    def __call__(self, partial: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """`residual += sum of partial over the ranks`; returns its norm and the residual, both [T, D].

        partial   [T, D]  is consumed
        residual  [T, D]  updated in place; None before the first norm, where the sum itself becomes the residual
        """
        if residual is None:
            residual = self.comm.all_reduce(partial)
            return ops.rms_norm(residual, self.weight, self.eps), residual
        return self.comm.all_reduce_add_rms_norm(partial, residual, self.weight, self.eps), residual
