"""The division of a model's heads and features over the ranks: equal shares where possible, else nearly equal ones.

Nothing is padded: a rank holds and computes its own share only. The first rank never has less than another. No torch.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_BLOCK = 128  # features that unequal shares keep together: a block of FP8 scales, and whole tiles of the kernels


class HeadShare(NamedTuple):
    """The query heads of one rank and their KV heads; all of these have equally many of the query heads."""

    queries: range
    kv: range
    holders: int  # ranks that hold the same KV heads, this one included


def share(count: int, rank: int, ranks: int) -> range:
    """Return the part of `count` units that belongs to this rank; the first ranks have one more if necessary."""
    least, more = divmod(count, ranks)
    first = rank * least + min(rank, more)
    return range(first, first + least + (rank < more))


def share_of_features(features: int, rank: int, ranks: int, block: int | None = None) -> slice:
    """Return this rank's features.

    block  features that must stay together; None lets equal shares be of any size, and other shares of whole blocks:
           of MAX_BLOCK features, or of fewer if some rank would have none
    """
    if block is None:
        block = features // ranks if features % ranks == 0 else _largest_block(features, ranks)
    blocks = share(features // block, rank, ranks)
    return slice(blocks.start * block, blocks.stop * block)


def _largest_block(features: int, ranks: int) -> int:
    block = MAX_BLOCK
    while features % block or features // block < ranks:
        block //= 2
    return block


def share_of_heads(num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> HeadShare:
    """Return this rank's heads: whole KV heads with their query heads; with more ranks, a part of one's query heads."""
    group = num_heads // num_kv_heads
    if ranks <= num_kv_heads:
        kv = share(num_kv_heads, rank, ranks)
        return HeadShare(range(kv.start * group, kv.stop * group), kv, 1)
    # The last KV heads have more ranks, so that the first rank has the most query heads.
    mirrored = ranks - 1 - rank
    nth = next(n for n in range(num_kv_heads) if mirrored in share(ranks, n, num_kv_heads))
    holders, head = share(ranks, nth, num_kv_heads), num_kv_heads - 1 - nth
    queries = share(group, holders.stop - 1 - mirrored, len(holders))
    return HeadShare(
        range(head * group + queries.start, head * group + queries.stop), range(head, head + 1), len(holders)
    )
