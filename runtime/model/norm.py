"""RMSNorm and the residual stream: the one place inside a layer where tensor parallelism reduces.

The layers before a norm add to the residual stream. A single rank adds within its GEMM, and leaves the norm to the
GEMM that follows. Of several ranks each has a partial sum, which the norm reduces over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .weights import Piece, Weights


def norm_weight(weights: Weights, name: str, size: int) -> Tensor:
    """Add the weight [size] of a norm to `weights`; it is the same on each rank."""
    return weights.add((size,), [Piece(name, (size,))], is_norm=True)


@dataclass
class Residual:
    """The residual stream [T, D] of one step, updated in place, and the partial sum that is not added yet."""

    total: Tensor
    partial: Tensor | None = None  # [T, D]; its sum over the ranks is the last layer's result


@dataclass(frozen=True)
class NormInput:
    """Rows [T, D] for a layer that normalizes its input; without a weight they are normalized already."""

    x: Tensor
    weight: Tensor | None = None
    eps: float = 0.0

    def tensor(self) -> Tensor:
        """Return the normalized rows, for a layer that cannot normalize them in its GEMM."""
        return self.x if self.weight is None else ops.rms_norm(self.x, self.weight, self.eps)


class RMSNorm:
    """The norm that completes the residual stream."""

    def __init__(self, weights: Weights, comm: Communicator, name: str, size: int, eps: float) -> None:
        self.weight = norm_weight(weights, f"{name}.weight", size)
        self.eps = eps
        self.comm = comm

    def __call__(self, residual: Residual) -> NormInput:
        """Add the partial sum, reduced over the ranks, to the stream; return the norm of the stream."""
        partial, residual.partial = residual.partial, None
        if partial is None:
            return NormInput(residual.total, self.weight, self.eps)
        return NormInput(self.comm.all_reduce_add_rms_norm(partial, residual.total, self.weight, self.eps))
