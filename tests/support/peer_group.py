"""Collectives of several ranks in one process, compared with sums in rank order."""

from __future__ import annotations

import random
from functools import reduce

import torch
from torch import Tensor

from peer_emulator import QueuedPeers

EPS = 1e-5
FUSED = ("push fused", "one-shot fused", "two-shot fused", "two-push fused")
PLAIN = ("push", "one-shot", "two-shot", "all-gather")


class PeerGroup:
    """A group of ranks in this process, and the collectives that it has queued.

    in_graph  they use the peer buffers in turn, as in a CUDA graph, and not the first one only
    """

    def __init__(self, peers: QueuedPeers, seed: int = 0, in_graph: bool = True) -> None:
        self.peers, self.kernels, self.size = peers, peers.kernels, peers.size
        self.generator = torch.Generator().manual_seed(seed)
        self.in_graph, self.index = in_graph, 0  # the index of the next peer buffer: see BufferRotation
        self.expectations: list[tuple[str, Tensor, Tensor, bool]] = []

    def queue(self, operation: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> None:
        fits = self.kernels.fits_two_pushes(rows, columns, dtype, self.peers.tables[0])
        if operation == "two-push fused" and not fits:
            operation = "two-shot fused"
        parts = [self.random(rows, columns, dtype) for _ in range(self.size)]
        residual, weight = self.random(rows, columns, dtype), self.random(1, columns, dtype)[0]
        for rank in range(self.size):
            with self.peers.on_rank(rank) as table:
                self.queue_on(operation, table, parts, rank, residual.clone(), weight)
        if self.in_graph and "push" not in operation:
            self.index = 2 if self.index == 1 else 1

    def queue_on(
        self, operation: str, table: object, parts: list[Tensor], rank: int, residual: Tensor, weight: Tensor
    ) -> None:
        name, _, fused = operation.partition(" ")
        x, exact = parts[rank], reduce(Tensor.add, [part.float() for part in parts])
        if operation == "all-gather":
            out = x.new_empty(self.size, *x.shape)
            as_bytes = out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8)
            self.kernels.all_gather(*as_bytes, table, self.index, "all_gather")
            self.expectations.append((operation, out, torch.stack(parts), True))
            return
        out = torch.full_like(x, torch.nan)
        if not fused:
            launch = getattr(self.kernels, f"{name.replace('-', '_')}_all_reduce")
            launch(out, x, table, *([] if name == "push" else [self.index]))
            self.expectations.append((operation, out, exact.to(x.dtype), True))
            return
        total = residual.float() + (exact.to(x.dtype).float() if name.startswith("two") else exact)
        if name == "push":
            self.kernels.push_all_reduce_add_rms_norm(out, x, residual, weight, EPS, table)
        elif name == "two-push":
            self.kernels.two_push_add_rms_norm(out, x, residual, weight, EPS, table)
        else:
            options = {"two_shot": name == "two-shot"}
            self.kernels.all_reduce_add_rms_norm(out, x, residual, weight, EPS, table, self.index, **options)
        norm = torch.nn.functional.rms_norm(total, (x.shape[1],), weight.float(), EPS)
        # The order of three float32 additions is that of the kernel only for the plain sum.
        self.expectations += [(operation, residual, total, False), (operation, out, norm, False)]

    def random(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator).to(self.peers.device, dtype)

    def check(self) -> None:
        """Run what is queued and compare; also every rank has the same bits."""
        self.peers.run()
        assert [self.peers.missing(rank) for rank in range(self.size)] == [[]] * self.size
        for operation, result, expected, exact in self.expectations:
            tolerance = 0 if exact else 4 * torch.finfo(result.dtype).eps
            same = torch.allclose(result.float(), expected.float(), rtol=tolerance, atol=tolerance)
            assert same, f"{operation} of {list(result.shape)}"
        self.expectations.clear()


def queue_all(
    group: PeerGroup,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    rows: tuple[int, int] = (1, 5),
    columns: tuple[int, ...] = (64, 200, 512),
) -> None:
    """Queue each collective twice, in random order, on a few rows."""
    order = random.Random(seed)
    for operation in order.sample(2 * (*PLAIN, *FUSED), 16):
        group.queue(operation, order.randint(*rows), order.choice(columns), dtype)
