"""The vocabulary, cut over the ranks by rows: lookup at the bottom, logits at the top.

The vocabulary is padded to a multiple of the number of ranks, so that all shards have one size. Padding is zero in the
weight and left out of the logits.
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
    """The rank's rows [V, D] of a [vocab_size, D] weight; V = vocab_size / ranks, rounded up."""
    num_rows = -(-vocab_size // comm.size)
    first = min(comm.rank * num_rows, vocab_size)
    stop = min(first + num_rows, vocab_size)
    piece = Piece(name, (vocab_size, hidden_size), (slice(first, stop),), (slice(0, stop - first),))
    return weights.add((num_rows, hidden_size), [piece], ignored=ignored)


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, comm: Communicator, weight: Tensor) -> None:
        self.comm = comm
        self.weight = weight
        self.first_row = comm.rank * len(weight)

    def __call__(self, token_ids: Tensor) -> Residual:
        """token_ids [T] -> the residual stream [T, D]: the sum of what each rank has of the lookup."""
        return Residual(self.comm.all_reduce(ops.gather_rows(self.weight, token_ids, first_row=self.first_row)))


class Head:
    """Hidden states to the logits of the rank's share of the vocabulary."""

    def __init__(self, comm: Communicator, weight: Tensor, vocab_size: int, *, batch_invariant: bool = False) -> None:
        self.comm = comm
        self.weight = weight
        self.vocab_size = vocab_size
        self.batch_invariant = batch_invariant

    def __call__(self, hidden: Normed) -> Logits:
        """Of rows [S, D], in their dtype."""
        shard = ops.linear(
            hidden.x, self.weight, norm=hidden.weight, eps=hidden.eps, batch_invariant=self.batch_invariant
        )
        return Logits(self.comm, shard, self.vocab_size)
