"""The collectives of several ranks on one GPU, each rank in a stream of this process: no MPS, no IPC, no NCCL."""

from __future__ import annotations

import pytest
import torch

from peer_emulator import PeerStreams
from peer_group import FUSED, PLAIN, PeerGroup, queue_all

pytestmark = pytest.mark.gpu
SMALL = {"rows": (1, 12), "columns": (64, 200, 512, 4096, 5120)}  # of at most 256 KiB: those that can be pushed


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(2, torch.float16), (2, torch.float32), *((size, torch.bfloat16) for size in (2, 3, 4, 8))],
)
def test_collectives_of_ranks_in_streams(size: int, dtype: torch.dtype) -> None:
    group = PeerGroup(PeerStreams(size, buffer_bytes=16 << 20))
    for seed in range(4):
        queue_all(group, seed, dtype, **SMALL)
        group.check()
    for operation in [name for name in (*PLAIN, *FUSED) if not name.startswith("push")]:
        group.queue(operation, 700, 5120, dtype)
    group.check()


@pytest.mark.parametrize("operations", [("one-shot", "push"), ("two-shot", "two-push")])
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_pushes_have_the_bits_of_pulls(size: int, operations: tuple[str, ...]) -> None:
    results = []
    for operation in operations:
        group = PeerGroup(PeerStreams(size, buffer_bytes=4 << 20))
        for rows, columns in ((1, 4096), (32, 4096), (12, 8192), (25, 5120)):
            group.queue(f"{operation} fused", rows, columns)
        results.append([result for _, result, *_ in group.expectations])
        group.check()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("operation", [*PLAIN, *FUSED])
def test_missing_rank_is_named(operation: str) -> None:
    group = PeerGroup(PeerStreams(3, buffer_bytes=1 << 20, timeout_ns=20_000_000))
    parts = [group.random(2, 96, torch.float32) for _ in range(3)]
    for rank in (0, 2):
        with group.peers.on_rank(rank) as table:
            group.queue_on(operation, table, parts, rank, parts[rank].clone(), parts[0][0])
    group.peers.run()
    assert all(1 in group.peers.missing(rank) for rank in (0, 2))
