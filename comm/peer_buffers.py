"""Peer memory: memory of each rank's GPU that all ranks of one host have mapped.

It has a header, in which the kernels keep their flags, mailboxes for small messages that peers push, three peer buffers
for messages that peers read, and inboxes for larger ones that they push. Imports CuPy, so only code that runs on GPUs
imports this module.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import peer_memory
from .base import PeerMemoryUnavailable
from .message_text import first_line
from .rendezvous import Rendezvous

log = logging.getLogger(__name__)
GRANULE = 2 << 20  # smaller allocations may share an exported block with others
VERIFY_S = 5.0  # `verify` waits at most this long for a peer's write
CLOSE_S = 3.0
DEVICE_SHARE = 0.9  # the device times out at this share of the deadline, before the host: it knows the missing rank
INBOX_BYTES = 8 << 20  # the largest message in an inbox, of which there are four


@dataclass
class BufferRotation:
    """The order in which collectives use the three peer buffers of a rank.

    A collective uses the same buffer on every rank. The host knows the address in advance: a GEMM can write its result
    there. No rank may write into a buffer that a slow peer still reads. Only buffer 0 costs a wait for this:

    - A collective releases buffer 0 only when all ranks have read it. Collectives outside of graphs use it, and the
      first collective of each graph: their predecessor is not known.
    - The other collectives of a graph use buffers 1 and 2 in turn.

    Example: a replay of graph A (three collectives), one of graph B (two), and an eager call:

        collective    A0  A1  A2  B0  B1  eager
        buffer_index   0   1   2   0   1      0

    B1 writes buffer 1, which a slow peer may still read in A1. But B1 is queued after B0 on this rank, and B0 waits
    until every peer arrives in it. A peer arrives in B0 after its A1 has ended, because its stream is in order.

    Proof for buffers 1 and 2. A write into one of them belongs to a collective that is not the first of its graph.
    Another collective lies between the write and the last use of that buffer: the first collective of this replay, or
    the one before the write, since buffers 1 and 2 alternate. It waits for every peer, as B0 does in the example.

    This holds for any order of graphs and eager calls, as long as it is the same on all ranks. A graph costs one more
    barrier. Within a collective, kernels/csrc/peer_protocol.cuh keeps the order by flags that count on the device.
    `captured_graph_id` is the number of the graph that is being captured, 0 outside of graphs.
    """

    graph_id: int = 0  # the graph of the latest collective
    next_index: int = 1  # the buffer of the next collective in that graph

    def peek(self, captured_graph_id: int) -> int:
        return self.next_index if captured_graph_id != 0 and captured_graph_id == self.graph_id else 0

    def take(self, captured_graph_id: int) -> int:
        """Return the buffer index of the next collective and move on."""
        index = self.peek(captured_graph_id)
        self.graph_id, self.next_index = captured_graph_id, 2 if index == 1 else 1
        return index


@dataclass(frozen=True)
class PeerTimeout:
    """A kernel's wait for peers that ended at the timeout."""

    ranks: list[int]
    operation: str
    round: int


class PeerBuffers:
    """One rank's peer memory and its mappings of the others'; call allocate, map and verify in this order.

    Each of these steps runs on all ranks before the next. It raises an error if this rank cannot map peer memory.
    buffer_bytes   size of a peer buffer: a multiple of 16, equal on all ranks
    shares_device  the ranks may use one GPU together
    """

    def __init__(self, rendezvous: Rendezvous, *, device: torch.device, buffer_bytes: int, shares_device: bool) -> None:
        self.rank, self.size, self.buffer_bytes = rendezvous.rank, rendezvous.size, buffer_bytes
        self.inbox_bytes = min(buffer_bytes, INBOX_BYTES)
        self.timeout_s = DEVICE_SHARE * rendezvous.timeout_s
        self._rendezvous = rendezvous
        self._device = torch.empty(0, device=device).device  # a device without an index gets the current one
        self.shares_device = shares_device
        self._ranks_per_device = rendezvous.size if shares_device else 1
        self._address = 0
        self._mapped: list[int] = []  # addresses of the peers' memory
        self._rotation = BufferRotation()

    def allocate(self) -> str:
        """Allocate the memory; return the most blocks of a launch here and the handle by which peers map it."""
        if self.size > peer_memory.MAX_RANKS:
            raise PeerMemoryUnavailable(f"{self.size} ranks are more than {peer_memory.MAX_RANKS}")
        if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
            raise PeerMemoryUnavailable("NCCL_P2P_DISABLE is set")
        inboxes = peer_memory.first_inbox(self.size, self.buffer_bytes)
        nbytes = whole_granules(inboxes + peer_memory.NUM_INBOXES * self.inbox_bytes)
        self._address, self._bytes = peer_memory.allocate(nbytes, self._device.index)
        self._bytes[inboxes:].fill_(peer_memory.EMPTY_BYTE)  # before `verify`, which all ranks pass before they push
        self._words = peer_memory.host_words(peer_memory.MAX_RANKS + 1)
        peer_memory.prepare(self.size)
        blocks = peer_memory.max_blocks(self._device.index, self._ranks_per_device)
        return f"{blocks} {peer_memory.export(self._address).hex()}"

    def map(self, handles: list[str]) -> str:
        """Map every peer's memory; `handles` are the results of `allocate` in rank order."""
        blocks, exported = zip(*(handle.split() for handle in handles), strict=True)
        addresses = [self._map_peer(peer, bytes.fromhex(handle)) for peer, handle in enumerate(exported)]
        fields = peer_memory.table_fields(
            addresses,
            self._words,
            timeout_ns=int(min(VERIFY_S, self._rendezvous.timeout_s / 2) * 1e9),
            buffer_bytes=self.buffer_bytes,
            inbox_bytes=self.inbox_bytes,
            rank=self.rank,
            alone=self._ranks_per_device == 1,
        )
        self._table = torch.tensor(fields, dtype=torch.int64, device=self._device)
        self.peers = peer_memory.PeerTable(self._table, self.size, min(map(int, blocks)), self.inbox_bytes)
        return ""

    def verify(self, turn: int) -> str:
        """Check that the peers' writes arrive here, and that their memory reads the same here as there.

        A successful mapping is no proof: in some virtual machines the peer maps a copy. Each turn writes other bytes.
        """
        generators = (torch.Generator().manual_seed(rank + turn * self.size) for rank in range(self.size))
        patterns = [torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=g) for g in generators]
        gathered = torch.empty(self.size, len(patterns[0]), dtype=torch.uint8, device=self._device)
        pattern = patterns[self.rank].to(self._device)
        peer_memory.all_gather(gathered.view(-1), pattern, self.peers, self.take_buffer_index(), "barrier")
        received = gathered.cpu()
        timeout = self.timeout()
        if timeout is not None:
            raise PeerMemoryUnavailable(f"writes of rank {_listed(timeout.ranks)} do not arrive")
        wrong = [rank for rank in range(self.size) if not torch.equal(received[rank], patterns[rank])]
        if wrong:
            raise PeerMemoryUnavailable(f"the memory of rank {_listed(wrong)} reads differently here")
        return ""

    def set_timeout(self, seconds: float) -> None:
        """Set how long kernels that are queued from now on wait for a peer."""
        self.timeout_s = seconds
        self._table[peer_memory.TIMEOUT_FIELD] = int(seconds * 1e9)

    def input(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the memory for the input of the next collective."""
        start = peer_memory.first_buffer(self.size) + self._rotation.peek(peer_memory.capture()) * self.buffer_bytes
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        assert nbytes <= self.buffer_bytes, "the policy sends larger messages to NCCL"
        memory: Tensor = self._bytes[start : start + nbytes]
        return memory.view(dtype).view(shape)

    def take_buffer_index(self) -> int:
        """Return the index of the peer buffer for the collective that is queued now."""
        return self._rotation.take(peer_memory.capture())

    def timeout(self) -> PeerTimeout | None:
        """Return the first wait of the device that timed out; results since then are invalid. Queries no GPU."""
        timeouts = {rank: word for rank, word in enumerate(self._words[: self.size].tolist()) if word}
        if not timeouts:
            return None
        first = next(iter(timeouts.values()))
        return PeerTimeout(list(timeouts), peer_memory.OPERATIONS[first >> 32], first & 0xFFFFFFFF)

    def stop(self) -> None:
        """End all waits of kernels, now and later; callable from any thread."""
        self._words[-1] = 1

    def close(self) -> None:
        """Unmap the peers' memory and free this rank's, once no rank uses it; the device has nothing queued.

        Memory that a peer may still have mapped is left to the end of the process.
        """
        address, self._address = self._address, 0
        try:
            self._rendezvous.exchange("peer buffers/done", timeout_s=CLOSE_S)
            while self._mapped:
                peer_memory.unmap(self._mapped.pop())
            self._rendezvous.exchange("peer buffers/unmapped", timeout_s=CLOSE_S)
            if address:
                peer_memory.free(address)
        except RuntimeError as error:  # CommError, or CUDA's
            log.warning("peer memory stays mapped until the process ends: %s", error)

    def _map_peer(self, peer: int, handle: bytes) -> int:
        if peer == self.rank:
            return self._address
        try:
            self._mapped.append(peer_memory.map_memory(handle, self._device.index))
        except RuntimeError as error:
            raise PeerMemoryUnavailable(f"cannot map the memory of rank {peer} ({first_line(error)})") from error
        return self._mapped[-1]


def whole_granules(nbytes: int) -> int:
    """Return `nbytes` rounded up, so that the exported memory holds no other allocation."""
    return -(-nbytes // GRANULE) * GRANULE


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
