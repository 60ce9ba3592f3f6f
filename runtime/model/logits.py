"""Logits of some rows, divided over the ranks by tokens like the vocabulary.

To sample a token, ranks exchange candidates: a score and a token packed into one int64, 8 bytes a row instead of a
vocabulary. Penalties, log-probabilities and grammars need every logit and gather them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator, SingleRank
from ...kernels import ops


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
