"""The logits of some rows, cut over the ranks by tokens as the vocabulary is.

To choose a token, ranks exchange contenders: a score and a token in one integer, 8 bytes a row instead of a vocabulary.
Who needs every logit, for penalties, log-probabilities or a grammar, asks for the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...comm.base import Communicator, SingleRank
from ...kernels import ops


@dataclass(frozen=True)
class Logits:
    """`shard` [S, v] has the rank's tokens from rank * v on; of the last ones there may be none in the vocabulary."""

    comm: Communicator
    shard: Tensor
    vocab_size: int

    @property
    def _own(self) -> Tensor:
        """Those of tokens that there are."""
        return self.shard[:, : max(0, self.vocab_size - self._first)]

    @property
    def _first(self) -> int:
        return self.comm.rank * self.shard.shape[1]

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, rows: slice | Tensor) -> Logits:
        return Logits(self.comm, self.shard[rows], self.vocab_size)

    def whole(self) -> Tensor:
        """[S, vocab_size], the same on every rank."""
        shards = self.comm.all_gather(self.shard)  # [ranks, S, v]
        return shards.transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def replicated(self) -> Logits:
        """The whole in float32, for a rank to do with as it pleases."""
        return Logits(SingleRank(), self.whole().float(), self.vocab_size)

    def race(self, temperature: Tensor, keys: Tensor) -> Tensor:
        """A token for each row, [S] int32, as `ops.gumbel_argmax` samples it; the same on every rank."""
        contenders = ops.gumbel_argmax(self._own, temperature, keys, first_token=self._first)
        return ops.merge_candidates(self.comm.all_gather(contenders))

    def best(self, count: int) -> Tensor:
        """The contenders of the greatest `count` of each row, or of as many as there are, descending.

        [S, C] int64 as `ops.topk_candidates` has them, equal logits by token; the same on every rank.
        """
        contenders = self.comm.all_gather(
            ops.topk_candidates(self._own, count, first_token=self._first)
        )  # [ranks, S, count]
        several = contenders.transpose(0, 1).flatten(1)
        return (several if len(contenders) == 1 else ops.topk_candidates(several, count))[:, : self.vocab_size]
