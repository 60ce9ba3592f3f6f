"""Peer buffers: memory of each rank's GPU that all ranks of one host have mapped.

A buffer has a header, in which the kernels keep their flags, and the slots for messages. Imports CuPy, so only code
that runs on GPUs imports this module.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import peer_memory
from .base import NotShared
from .message_text import first_line
from .rendezvous import Rendezvous

log = logging.getLogger(__name__)
GRANULE = 2 << 20  # smaller allocations may share an exported block with others
VERIFY_S = 5.0  # the most that `verify` waits for what a peer writes
CLOSE_S = 3.0
DEVICE_SHARE = 0.9  # of the deadline: the device times out before the host, because it knows the missing rank
NUM_SLOTS = 3  # of slot_bytes each


@dataclass
class SlotRotation:
    """The order in which collectives use the three slots of a peer buffer.

    A collective's input lies in the same slot on every rank, at an address that the host knows before: a GEMM can write
    it there. No rank may write into a slot that a slow peer still reads. Only slot 0 costs a wait for this:

    - A collective releases slot 0 only when all ranks have read it. Collectives outside of graphs use it, and the first
      collective of each graph: their predecessor is not known.
    - The other collectives of a graph use slots 1 and 2 in turn.

    Proof. Let w be a write into slot s for collective k, and c the last collective before k that used s. If s is 0, c
    has ended on this rank, and it ended only when every rank had read. Otherwise k is not the first of its graph. Since
    the slots alternate, c belongs to another replay, or is at least two places earlier in this one. In both cases some
    collective m of this replay lies between them: c < m < k. In m this rank has waited until every peer reached m. A
    peer reaches m when its c has ended, because its stream is in order. On this rank w is queued after m: every peer
    has read before.

    This holds for any order of graphs and eager calls, as long as it is the same on all ranks. A graph costs one more
    barrier. Within a collective, kernels/csrc/allreduce.cu keeps the order by flags that count on the device.
    `capture` is the number of the graph that is being captured, 0 outside of graphs.
    """

    graph: int = 0
    next_slot: int = 1  # of the next collective of that graph

    def peek(self, capture: int) -> int:
        return self.next_slot if capture != 0 and capture == self.graph else 0

    def take(self, capture: int) -> int:
        """Return the slot of the next collective and move on."""
        slot = self.peek(capture)
        self.graph, self.next_slot = capture, 2 if slot == 1 else 1
        return slot


@dataclass(frozen=True)
class PeerTimeout:
    """A kernel's wait for peers that ended at the timeout."""

    ranks: list[int]
    operation: str
    round: int


class PeerBuffers:
    """One rank's buffer and its mappings of the others', to be set up by allocate, map and verify, in this order.

    Each of these steps runs on all ranks before the next. It raises an error if this rank cannot share memory.
    slot_bytes     size of a slot: a multiple of 16, equal on all ranks
    shares_device  the ranks may use one GPU together
    """

    def __init__(self, rendezvous: Rendezvous, *, device: torch.device, slot_bytes: int, shares_device: bool) -> None:
        self.rank, self.size, self.slot_bytes = rendezvous.rank, rendezvous.size, slot_bytes
        self.timeout_s = DEVICE_SHARE * rendezvous.timeout_s
        self._rendezvous = rendezvous
        self._device = torch.empty(0, device=device).device  # with its index
        self._ranks_per_device = rendezvous.size if shares_device else 1
        self._address = 0
        self._mapped: list[int] = []  # addresses of the peers' buffers
        self._rotation = SlotRotation()

    def allocate(self) -> str:
        """Allocate the buffer; returns the most blocks of a launch here and the handle by which peers map it."""
        if self.size > peer_memory.MAX_RANKS:
            raise NotShared(f"{self.size} ranks are more than {peer_memory.MAX_RANKS}")
        if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
            raise NotShared("NCCL_P2P_DISABLE is set")
        nbytes = whole_granules(peer_memory.HEADER_BYTES + NUM_SLOTS * self.slot_bytes)
        self._address, self._bytes = peer_memory.allocate(nbytes, self._device.index)
        self._words = peer_memory.host_words(peer_memory.MAX_RANKS + 1)
        peer_memory.prepare(self.size)
        blocks = peer_memory.max_blocks(self._device.index, self._ranks_per_device)
        return f"{blocks} {peer_memory.export(self._address).hex()}"

    def map(self, offers: list[str]) -> str:
        """Map every peer's buffer; `offers` are the results of `allocate` in rank order."""
        blocks, handles = zip(*(offer.split() for offer in offers), strict=True)
        addresses = [self._map_peer(peer, bytes.fromhex(handle)) for peer, handle in enumerate(handles)]
        fields = peer_memory.table(
            addresses,
            self._words,
            timeout_ns=int(min(VERIFY_S, self._rendezvous.timeout_s / 2) * 1e9),
            slot_bytes=self.slot_bytes,
            rank=self.rank,
            alone=self._ranks_per_device == 1,
        )
        self._table = torch.tensor(fields, dtype=torch.int64, device=self._device)
        self.group = peer_memory.Group(self._table, self.size, min(map(int, blocks)))
        return ""

    def verify(self, turn: int) -> str:
        """Check that the peers' writes arrive here, and that their memory reads the same here as there.

        A successful mapping is no proof: in some virtual machines the peer maps a copy. Each turn writes other bytes.
        """
        generators = (torch.Generator().manual_seed(rank + turn * self.size) for rank in range(self.size))
        patterns = [torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=g) for g in generators]
        gathered = torch.empty(self.size, len(patterns[0]), dtype=torch.uint8, device=self._device)
        pattern = patterns[self.rank].to(self._device)
        peer_memory.all_gather(gathered.view(-1), pattern, self.group, self.take_slot(), "barrier")
        received = gathered.cpu()
        timeout = self.timeout()
        if timeout is not None:
            raise NotShared(f"what rank {_listed(timeout.ranks)} writes does not arrive")
        wrong = [rank for rank in range(self.size) if not torch.equal(received[rank], patterns[rank])]
        if wrong:
            raise NotShared(f"the memory of rank {_listed(wrong)} reads differently here")
        return ""

    def set_timeout(self, seconds: float) -> None:
        """Set how long kernels that are queued from now on wait for a peer."""
        self.timeout_s = seconds
        self._table[peer_memory.TIMEOUT_FIELD] = int(seconds * 1e9)

    def input(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the memory for the input of the next collective."""
        start = peer_memory.HEADER_BYTES + self._rotation.peek(peer_memory.capture()) * self.slot_bytes
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        assert nbytes <= self.slot_bytes, "the policy sends larger messages to NCCL"
        memory: Tensor = self._bytes[start : start + nbytes]
        return memory.view(dtype).view(shape)

    def take_slot(self) -> int:
        """Return the slot of the collective that is queued now."""
        return self._rotation.take(peer_memory.capture())

    def timeout(self) -> PeerTimeout | None:
        """Return the first wait of the device that timed out; results since then are invalid. Queries no GPU."""
        timeouts = {rank: word for rank, word in enumerate(self._words[: self.size].tolist()) if word}
        if not timeouts:
            return None
        first = next(iter(timeouts.values()))
        return PeerTimeout(list(timeouts), peer_memory.KINDS[first >> 32], first & 0xFFFFFFFF)

    def stop(self) -> None:
        """End all waits of kernels, now and later; callable from any thread."""
        self._words[-1] = 1

    def close(self) -> None:
        """Unmap the peers' buffers and free this rank's, once no rank uses them; the device has nothing queued.

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
            if self.rank == 0:  # its process may serve the store: it leaves last
                self._rendezvous.exchange("peer buffers/left", timeout_s=CLOSE_S)
            else:
                self._rendezvous.post("peer buffers/left")
        except RuntimeError as error:  # CommError, or CUDA's
            log.warning("what is still mapped is left to the end of the process: %s", error)

    def _map_peer(self, peer: int, handle: bytes) -> int:
        if peer == self.rank:
            return self._address
        try:
            self._mapped.append(peer_memory.map_memory(handle, self._device.index))
        except RuntimeError as error:
            raise NotShared(f"cannot map the memory of rank {peer} ({first_line(error)})") from error
        return self._mapped[-1]


def whole_granules(nbytes: int) -> int:
    """Return `nbytes` rounded up, so that the exported memory holds no other allocation."""
    return -(-nbytes // GRANULE) * GRANULE


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
