"""Embedding, output head and logits, with the vocabulary divided over the ranks.

The vocabulary is padded to a multiple of the number of ranks, so that all shards have one size. Padding rows are zero
in the weight, and their logits are ignored.

To sample a token, ranks exchange candidates: a score and a token packed into one int64, 8 bytes a row instead of a
vocabulary. Penalties, log-probabilities and grammars need every logit and gather them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator, SingleRank
from ...kernels import ops
from ...kernels.arguments import Matrix
from .fp8_weights import add_matrix
from .norm import NormInput
from .weights import Piece, Weights


def vocabulary_shard(
    weights: Weights, comm: Communicator, name: str, vocab_size: int, hidden_size: int, *, ignored: tuple[str, ...] = ()
) -> Tensor:
    """Add the rank's rows [V, D] of a [vocab_size, D] weight to `weights`; V = vocab_size / ranks, rounded up."""
    num_rows = -(-vocab_size // comm.size)
    return weights.add(
        (num_rows, hidden_size), [_vocabulary_piece(comm, name, vocab_size, hidden_size)], ignored=ignored
    )


def head_shard(weights: Weights, comm: Communicator, name: str, vocab_size: int, hidden_size: int) -> Matrix:
    """Do `vocabulary_shard` for the head, which is FP8 if the checkpoint says so."""
    if weights.quantization is None or not weights.quantization.includes_head:
        return vocabulary_shard(weights, comm, name, vocab_size, hidden_size)
    shape = -(-vocab_size // comm.size), hidden_size
    return add_matrix(weights, shape, [_vocabulary_piece(comm, name, vocab_size, hidden_size)])


def _vocabulary_piece(comm: Communicator, name: str, vocab_size: int, hidden_size: int) -> Piece:
    num_rows = -(-vocab_size // comm.size)
    first = min(comm.rank * num_rows, vocab_size)
    stop = min(first + num_rows, vocab_size)
    return Piece(name, (vocab_size, hidden_size), (slice(first, stop),), (slice(0, stop - first),))


class Embedding:
    """The lookup of token ids, times a number."""

    def __init__(self, comm: Communicator, weight: Tensor, multiplier: float = 1.0) -> None:
        self.comm, self.weight, self.multiplier = comm, weight, multiplier
        self.first_row = comm.rank * len(weight)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return the rows [T, D] of token_ids [T]: the sum of the ranks' partial lookups."""
        rows = self.comm.all_reduce(ops.gather_rows(self.weight, token_ids, first_row=self.first_row))
        return rows if self.multiplier == 1 else rows.mul_(self.multiplier)


class LMHead:
    """The projection of hidden states to the logits of the rank's vocabulary shard, divided by `scaling`.

    softcap          bounds the logits: softcap * tanh(logit / softcap); None does not
    batch_invariant  as in Decoder
    """

    def __init__(
        self,
        comm: Communicator,
        weight: Matrix,
        vocab_size: int,
        *,
        scaling: float = 1.0,
        softcap: float | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.comm, self.weight, self.vocab_size = comm, weight, vocab_size
        self.scaling, self.softcap, self.batch_invariant = scaling, softcap, batch_invariant

    def __call__(self, hidden: NormInput) -> Logits:
        """Return the logits of rows [S, D], in their dtype."""
        norm, invariant = hidden.weight, self.batch_invariant
        shard = ops.linear(hidden.x, self.weight, norm=norm, eps=hidden.eps, batch_invariant=invariant)
        if self.scaling != 1:
            shard /= self.scaling
        if self.softcap is not None:
            shard = (shard / self.softcap).tanh_() * self.softcap
        return Logits(self.comm, shard, self.vocab_size)


@dataclass(frozen=True)
class Logits:
    """One rank's logits: `shard` [S, v] has the tokens from rank * v on, the last ranks' with vocabulary padding."""

    comm: Communicator
    shard: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, rows: slice | Tensor) -> Logits:
        return Logits(self.comm, self.shard[rows], self.vocab_size)

    def gather(self) -> Tensor:
        """Return all logits [S, vocab_size], the same on every rank."""
        shards = self.comm.all_gather(self.shard)  # [ranks, S, v]
        return shards.transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def replicated(self) -> Logits:
        """Return a float32 copy of all logits, which the rank may change."""
        return Logits(SingleRank(), self.gather().float(), self.vocab_size)

    def gumbel_argmax(self, temperature: Tensor, keys: Tensor) -> Tensor:
        """Sample a token for each row as `ops.gumbel_argmax` does; returns [S] int32, the same on every rank."""
        candidates = ops.gumbel_argmax(self._unpadded, temperature, keys, first_token=self._first_token)
        return ops.merge_candidates(self.comm.all_gather(candidates))

    def topk_candidates(self, count: int) -> Tensor:
        """Return the `count` greatest of each row, or all tokens if there are fewer, in descending order.

        [S, C] int64 as packed by `ops.topk_candidates`, equal logits in the order of tokens; the same on every rank.
        """
        best_of_shard = ops.topk_candidates(self._unpadded, count, first_token=self._first_token)
        candidates = self.comm.all_gather(best_of_shard)  # [ranks, S, count]
        merged = candidates.transpose(0, 1).flatten(1)
        return (merged if len(candidates) == 1 else ops.topk_candidates(merged, count))[:, : self.vocab_size]

    @property
    def _unpadded(self) -> Tensor:
        """This rank's logits without vocabulary padding."""
        return self.shard[:, : max(0, self.vocab_size - self._first_token)]

    @property
    def _first_token(self) -> int:
        return self.comm.rank * self.shard.shape[1]
