"""The division of heads and features over the ranks, by brute force over small numbers."""

from __future__ import annotations

import pytest

from lockstep.runtime.model.rank_shares import share_of_features, share_of_heads


def _indices(features: int, rank: int, ranks: int, block: int | None = None) -> list[int]:
    return list(range(features)[share_of_features(features, rank, ranks, block)])


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (9, 3), (14, 2), (28, 4), (4, 1), (12, 6)])
def test_each_query_head_has_one_rank_and_its_kv_head_there(num_heads: int, num_kv_heads: int) -> None:
    group = num_heads // num_kv_heads
    for ranks in range(1, num_heads + 1):
        shares = [share_of_heads(num_heads, num_kv_heads, rank, ranks) for rank in range(ranks)]
        assert [head for share in shares for head in share.queries] == list(range(num_heads))
        for share in shares:
            assert {head // group for head in share.queries} == set(share.kv)
            assert len(share.queries) % len(share.kv) == 0
            assert share.holders == sum(share.kv == other.kv for other in shares)
            assert len(share.queries) <= len(shares[0].queries)
            assert len(share.kv) <= len(shares[0].kv)
        if num_kv_heads % ranks == 0:
            assert len({len(share.queries) for share in shares}) == 1


@pytest.mark.parametrize("features", [48, 96, 127, 1376, 2880])
def test_each_feature_has_one_rank(features: int) -> None:
    for ranks in range(1, 12):
        shares = [_indices(features, rank, ranks) for rank in range(ranks)]
        assert [n for share in shares for n in share] == list(range(features))
        assert max(map(len, shares)) == len(shares[0])
        assert min(map(len, shares)) > 0


def test_unequal_shares_are_whole_blocks() -> None:
    assert [len(_indices(1536, rank, 5)) for rank in range(5)] == [384, 384, 256, 256, 256]
    assert [len(_indices(1376, rank, 8)) for rank in range(8)] == [172] * 8  # equal shares may cut a block
    assert [len(_indices(48, rank, 5)) for rank in range(5)] == [16, 8, 8, 8, 8]
    assert [len(_indices(2880, rank, 4, block=32)) for rank in range(4)] == [736, 736, 704, 704]
