"""Tensor-parallel linear layers and the MLP, in Megatron's order.

The first layer of a pair is divided by output rows, the second by input columns. The ranks exchange nothing between
the two: each computes whole heads, or its intermediate features. The second layer adds to the residual stream. A
single rank adds at once; several leave partial sums, which the next norm reduces. So does a single rank before a norm
of the result.
Shapes: T tokens, D hidden, I the rank's intermediate features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from ...kernels.arguments import Matrix, Rows
from .families import Activation
from .fp8_weights import add_matrix
from .norm import NormInput, Residual
from .rank_shares import share_of_features
from .weights import ALL, Piece, Weights


def shard_of(size: int, comm: Communicator) -> slice:
    """Return the rank's slice of `size` features."""
    return share_of_features(size, comm.rank, comm.size)


@dataclass(frozen=True)
class Projection:
    """One [features, D] projection of the checkpoint, and the rows that the rank computes."""

    name: str
    features: int
    rows: slice
    pairs: int = 0  # see Piece

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


def projections(names: Sequence[str], features: Sequence[int], rows: Sequence[slice]) -> list[Projection]:
    """Return the rank's `rows` of projections with these features.

    names  the tensor of each; or one tensor that has the features of all, one after the other
    """
    if len(names) > 1:
        return [Projection(name, size, part) for name, size, part in zip(names, features, rows, strict=True)]
    starts = [sum(features[:n]) for n in range(len(features))]
    shifted = [slice(start + part.start, start + part.stop) for start, part in zip(starts, rows, strict=True)]
    return [Projection(names[0], sum(features), part) for part in shifted]


class ColumnLinear:
    """Several projections of the same input in one GEMM: the rank's rows of each, concatenated.

    gated  the result is `silu(first half) * second half`
    """

    def __init__(
        self,
        weights: Weights,
        projections: Sequence[Projection],
        in_features: int,
        *,
        bias: bool,
        gated: bool = False,
    ) -> None:
        self.batch_invariant, self.gated = weights.batch_invariant, gated
        total = sum(p.num_rows for p in projections)
        matrix, vector, start = [], [], 0
        for p in projections:
            into = (slice(start, start + p.num_rows),)
            matrix.append(Piece(f"{p.name}.weight", (p.features, in_features), (p.rows,), into, pairs=p.pairs))
            vector.append(Piece(f"{p.name}.bias", (p.features,), (p.rows,), into, pairs=p.pairs))
            start += p.num_rows
        self.weight = add_matrix(weights, (total, in_features), matrix, gated=gated)
        self.bias = weights.add((total,), vector) if bias else None

    def __call__(self, normed: NormInput) -> Tensor:
        """Return [T, the rank's rows] of rows [T, D], or half as many if gated."""
        x, norm, eps, invariant = normed.x, normed.weight, normed.eps, self.batch_invariant
        return ops.linear(x, self.weight, self.bias, norm=norm, eps=eps, gated=self.gated, batch_invariant=invariant)

    def hidden_of(self, normed: NormInput, feeds: Matrix) -> Rows:
        """Return the gated result for the layer of the weight `feeds`, which alone takes it."""
        x, norm, eps, invariant = normed.x, normed.weight, normed.eps, self.batch_invariant
        return ops.gated_linear(x, self.weight, feeds, self.bias, norm=norm, eps=eps, batch_invariant=invariant)


class RowLinear:
    """The rank's `columns` of one projection [out_features, in_features] that adds to the residual stream.

    norm_follows  in every step a norm reduces the partial sum, and nothing adds to it before
    """

    def __init__(
        self,
        weights: Weights,
        comm: Communicator,
        name: str,
        out_features: int,
        in_features: int,
        columns: slice,
        *,
        bias: bool,
        norm_follows: bool = True,
    ) -> None:
        piece = Piece(f"{name}.weight", (out_features, in_features), (ALL, columns))
        self.weight = add_matrix(weights, (out_features, columns.stop - columns.start), [piece])
        self.out_features = out_features
        self.bias = weights.add((out_features,), [Piece(f"{name}.bias", (out_features,))]) if bias else None
        self.comm, self.norm_follows = comm, norm_follows
        self.batch_invariant = weights.batch_invariant
        self.adds_bias = comm.rank == 0  # the sum over the ranks contains the bias once

    def __call__(self, x: Rows, residual: Residual) -> None:
        """Add the projection of x [T, the rank's columns] to `residual`."""
        bias = self.bias if self.adds_bias else None
        if self.comm.size == 1 and not residual.separate:
            ops.linear(x, self.weight, bias, add_to=residual.total, batch_invariant=self.batch_invariant)
        elif self.norm_follows and not residual.separate:
            residual.partial = self.comm.linear(x, self.weight, bias, batch_invariant=self.batch_invariant)
        else:
            out = self.comm.buffer(len(x), self.out_features, x.dtype)
            residual.partial = ops.linear(x, self.weight, bias, out=out, batch_invariant=self.batch_invariant)


class MLP:
    """`down(activation(gate(x)) * up(x))`, divided over the ranks by intermediate features.

    gate_up       the names of both tensors, or of one that has the rows of gate, then of up
    norm_follows  see RowLinear
    """

    def __init__(
        self,
        weights: Weights,
        comm: Communicator,
        gate_up: Sequence[str],
        down: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        activation: Activation = "silu",
        norm_follows: bool = True,
    ) -> None:
        rows = shard_of(intermediate_size, comm)
        parts = projections(gate_up, (intermediate_size,) * 2, (rows, rows))
        self.gate_up = ColumnLinear(weights, parts, hidden_size, bias=bias, gated=activation == "silu")
        features = hidden_size, intermediate_size
        self.down = RowLinear(weights, comm, down, *features, rows, bias=bias, norm_follows=norm_follows)

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Add the MLP of rows [T, D] to `residual`."""
        if self.gate_up.gated:
            self.down(self.gate_up.hidden_of(normed, self.down.weight), residual)
        else:
            self.down(ops.gelu_and_mul(self.gate_up(normed)), residual)
