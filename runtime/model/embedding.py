"""Embedding and output head, with the vocabulary divided over the ranks by rows.

The vocabulary is padded to a multiple of the number of ranks, so that all shards have one size. Padding rows are zero
in the weight, and their logits are ignored.
"""

from __future__ import annotations

from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .logits import Logits
from .norm import Normed, Residual
from .weights import Piece, Weights


def vocabulary_shard(
    weights: Weights, comm: Communicator, name: str, vocab_size: int, hidden_size: int, *, ignored: tuple[str, ...] = ()
) -> Tensor:
    """Add the rank's rows [V, D] of a [vocab_size, D] weight to `weights`; V = vocab_size / ranks, rounded up."""
    num_rows = -(-vocab_size // comm.size)
    first = min(comm.rank * num_rows, vocab_size)
    stop = min(first + num_rows, vocab_size)
    piece = Piece(name, (vocab_size, hidden_size), (slice(first, stop),), (slice(0, stop - first),))
    return weights.add((num_rows, hidden_size), [piece], ignored=ignored)


class Embedding:
    """The lookup of token ids."""

    def __init__(self, comm: Communicator, weight: Tensor) -> None:
        self.comm = comm
        self.weight = weight
        self.first_row = comm.rank * len(weight)

    def __call__(self, token_ids: Tensor) -> Residual:
        """Return the residual stream [T, D] of token_ids [T]: the sum of the ranks' partial lookups."""
        return Residual(self.comm.all_reduce(ops.gather_rows(self.weight, token_ids, first_row=self.first_row)))


class Head:
    """The projection of hidden states to the logits of the rank's vocabulary shard."""

    def __init__(self, comm: Communicator, weight: Tensor, vocab_size: int, *, batch_invariant: bool = False) -> None:
        self.comm = comm
        self.weight = weight
        self.vocab_size = vocab_size
        self.batch_invariant = batch_invariant

    def __call__(self, hidden: Normed) -> Logits:
        """Return the logits of rows [S, D], in their dtype."""
        shard = ops.linear(
            hidden.x, self.weight, norm=hidden.weight, eps=hidden.eps, batch_invariant=self.batch_invariant
        )
        return Logits(self.comm, shard, self.vocab_size)
