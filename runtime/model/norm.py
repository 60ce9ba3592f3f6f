"""RMSNorm and the residual stream: the one place inside a layer where tensor parallelism reduces.

The layers before a norm add to the residual stream. A single rank adds within its GEMM, and leaves the norm to the
GEMM that follows. Of several ranks each has a partial sum, which the norm reduces over the ranks. Some families have
norms of a layer's result, which then is a partial sum on a single rank, too.
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
    separate: bool = False  # also a single rank leaves its result in `partial`, for a norm of it


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

    def add_to(self, residual: Residual) -> None:
        """Add the norm of the partial sum, reduced over the ranks, to the stream."""
        partial, residual.partial = residual.partial, None
        assert partial is not None, "the stream of a family with norms after its layers is separate"
        residual.total += ops.rms_norm(self.comm.all_reduce(partial), self.weight, self.eps)


class WideQKNorm:
    """RMSNorm over all query heads together, and over all key heads; each rank has some of them.

    The ranks add up their sums of squares. Of ranks that hold the same key head, each counts its part of it.

    features  of all query heads, and of all key heads
    rows      the rank's part of both
    holders   ranks that hold the same key heads
    """

    def __init__(
        self,
        weights: Weights,
        comm: Communicator,
        name: str,
        features: tuple[int, int],
        rows: tuple[slice, slice],
        eps: float,
        holders: int,
    ) -> None:
        self.features, self.holders = features, holders
        self.sizes = [part.stop - part.start for part in rows]
        q, k = (
            weights.add((size,), [Piece(f"{name}.{x}_norm.weight", (whole,), (part,))], is_norm=True)
            for x, size, whole, part in zip("qk", self.sizes, features, rows, strict=True)
        )
        self.weights, self.eps, self.comm = (q, k), eps, comm

    def __call__(self, qkv: Tensor) -> None:
        """Norm q and k of `qkv` [T, (H + 2 Hkv) E] in place."""
        squares = ops.sum_squares(qkv, self.sizes)  # [T, 2]
        if self.holders > 1:
            squares[:, 1] /= self.holders
        squares = self.comm.all_reduce(squares)
        q, k, _ = qkv.split([*self.sizes, self.sizes[1]], dim=1)
        for n, (x, weight) in enumerate(zip((q, k), self.weights, strict=True)):
            scale = (squares[:, n : n + 1] / self.features[n] + self.eps).rsqrt()  # [T, 1]
            x.copy_(x * scale * weight)  # in float32, as the scale is, and rounded once


class LayerNorms:
    """The norms around attention or an MLP: of its input, of its result, or of both.

    names  those of the two norms in the layer `name`; None is no norm
    """

    def __init__(
        self,
        weights: Weights,
        comm: Communicator,
        name: str,
        names: tuple[str | None, str | None],
        size: int,
        eps: float,
    ) -> None:
        self._before, self._after = (
            None if norm is None else RMSNorm(weights, comm, f"{name}.{norm}", size, eps) for norm in names
        )

    def before(self, residual: Residual) -> NormInput:
        """Return the input of the layer."""
        return NormInput(residual.total) if self._before is None else self._before(residual)

    def after(self, residual: Residual) -> None:
        """Add the norm of the layer's result to the stream, if there is one; else leave the result as it is."""
        if self._after is not None:
            self._after.add_to(residual)
