"""Arenas: memory of each rank that all ranks of one host have mapped, and who may write where.

An arena has three slots. A collective's input lies in one of them on every rank, at an address that the host knows
before: a product writes it there. No rank may write into a slot that a slow peer still reads, and nothing is waited for
only to make sure of that, but in slot 0:

- Slot 0 is left by its collective only when all ranks have read it. It serves whoever cannot know what came before:
  collectives outside of graphs, and the first of each graph.
- Slots 1 and 2 serve the other collectives of a graph in turn.

Proof. Let w be a write into slot s for collective k, and c the last collective before k that used s. If s is 0, c has
ended on this rank, and ended only when every rank had read. Else k is not the first of its graph, and c is either not
of this replay or at least two places earlier in it, since the slots take turns; in both cases some collective m of
this replay lies between them, c < m < k. In m this rank has waited until every peer had come to m, and a peer
comes to m when its c has ended: its stream is in order. On this rank w is queued after m: every peer has read before.

All of it holds for any order of graphs and eager calls, as long as it is the same on all ranks. A graph costs one
more meeting of the ranks. Within a collective, kernels/csrc/allreduce.cu keeps order by flags that count on the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .rendezvous import exchange

log = logging.getLogger(__name__)
SLOTS = 3
GRANULE = 2 << 20  # smaller allocations may share an exported block with others
GREETING_S = 5.0  # at most, for what a rank writes to be seen by its peers
CLOSE_S = 3.0
SPARE = 0.9  # of the deadline: the device, which knows for whom it waits, speaks before the host
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class NotShared(RuntimeError):
    """Memory cannot be shared; the message is the reason, the same on all ranks once they have agreed."""


@dataclass
class SlotRotation:
    """Which slot is next; `capture` is a number for the graph that is being captured, 0 outside of graphs."""

    graph: int = 0
    after: int = 1  # the slot of the next collective of that graph

    def peek(self, capture: int) -> int:
        return self.after if capture != 0 and capture == self.graph else 0

    def take(self, capture: int) -> int:
        slot = self.peek(capture)
        self.graph, self.after = capture, 2 if slot == 1 else 1
        return slot


@dataclass(frozen=True)
class Late:
    """What the device has waited for in vain."""

    ranks: list[int]
    kind: str
    round: int


class PeerBuffers:
    """One rank's arena and its view of the others'; made by `join`."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        store: Store,
        device: torch.device,
        slot_bytes: int,
        shares_device: bool,
        timeout_s: float,
    ) -> None:
        self.rank, self.size, self.slot_bytes = rank, size, slot_bytes
        self.patience_s = SPARE * timeout_s
        self._store, self._timeout_s = store, timeout_s
        self._device = torch.empty(0, device=device).device  # with its index
        self._sharers = size if shares_device else 1
        self._own = 0
        self._mapped: list[int] = []  # of the peers
        self._turns = SlotRotation()

    # The steps of joining. Each returns what the peers need to know, or raises what keeps this rank from it.

    def offer(self) -> str:
        """Allocate the arena; the blocks that a launch may have here, and the handle by which others map the memory."""
        self._peers = peer_memory = _peers()
        if self.size > peer_memory.MAX_RANKS:
            raise NotShared(f"{self.size} ranks are more than {peer_memory.MAX_RANKS}")
        if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
            raise NotShared("NCCL_P2P_DISABLE is set")
        nbytes = -(-(peer_memory.HEADER_BYTES + SLOTS * self.slot_bytes) // GRANULE) * GRANULE
        self._own, self._bytes = peer_memory.allocate(nbytes, self._device.index)
        self._words = peer_memory.host_words(peer_memory.MAX_RANKS + 1)
        peer_memory.prepare(self.size)
        return f"{peer_memory.max_blocks(self._device.index, self._sharers)} {peer_memory.export(self._own).hex()}"

    def map(self, offers: list[str]) -> str:
        """Map every peer's arena."""
        blocks, handles = zip(*(offer.split() for offer in offers), strict=True)
        arenas = []
        for peer, handle in enumerate(handles):
            try:
                arenas.append(self._own if peer == self.rank else self._map(bytes.fromhex(handle)))
            except RuntimeError as error:
                raise NotShared(f"cannot map the memory of rank {peer} ({_first_line(error)})") from error
        fields = self._peers.table(
            arenas,
            self._words,
            timeout_ns=int(min(GREETING_S, self._timeout_s / 2) * 1e9),
            slot_bytes=self.slot_bytes,
            rank=self.rank,
            alone=self._sharers == 1,
        )
        self._table = torch.tensor(fields, dtype=torch.int64, device=self._device)
        self._group = self._peers.Group(self._table, self.size, min(map(int, blocks)))
        return ""

    def greet(self, turn: int) -> str:
        """See that what each peer writes arrives here, and that its memory reads here as it does there.

        That a peer has mapped the memory is no proof: in some virtual machines it gets a copy of its own.
        """
        patterns = [_pattern(rank + turn * self.size) for rank in range(self.size)]
        found = self.all_gather(patterns[self.rank].to(self._device), kind="barrier").cpu()
        late = self.late()
        if late is not None:
            raise NotShared(f"what rank {_names(late.ranks)} writes does not arrive")
        wrong = [rank for rank in range(self.size) if not torch.equal(found[rank], patterns[rank])]
        if wrong:
            raise NotShared(f"the memory of rank {_names(wrong)} reads differently here")
        return ""

    def set_patience(self, seconds: float) -> None:
        """How long kernels that are queued from now on wait for a peer."""
        self.patience_s = seconds
        self._table[self._peers.TIMEOUT_FIELD] = int(seconds * 1e9)

    # Collectives. Inputs and outputs are contiguous and not empty; the input fits into a slot.

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where the input of the next collective may be written, so that it need not be copied."""
        return self._slot(self._turns.peek(self._peers.capture()), shape, dtype)

    def all_reduce(self, x: Tensor, *, two_shot: bool) -> Tensor:
        out, add = torch.empty_like(x), self._peers.two_shot_all_reduce if two_shot else self._peers.one_shot_all_reduce
        add(out, x, self._group, self._take(), "all_reduce")
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x[0])
        self._peers.reduce(out, x, self._group, self._take(), "reduce_scatter", chunks=self.size)
        return out

    def all_gather(self, x: Tensor, *, kind: str = "all_gather") -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        whole, part = out.view(-1).view(torch.uint8), x.view(-1).view(torch.uint8)
        self._peers.all_gather(whole, part, self._group, self._take(), kind)
        return out

    def all_reduce_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, two_shot: bool
    ) -> Tensor:
        out, total = torch.empty_like(x), _aligned(residual)
        inputs = _aligned(x), total, _aligned(weight), eps, self._group, self._take()
        self._peers.all_reduce_add_rms_norm(out, *inputs, "all_reduce_add_rms_norm", two_shot=two_shot)
        if total is not residual:
            residual.copy_(total)
        return out

    def fits_norm(self, columns: int, dtype: torch.dtype) -> bool:
        return bool(self._peers.fits_norm(columns, dtype))

    # Ends.

    def late(self) -> Late | None:
        """For whom the device has waited in vain; its results since then are garbage. Asks no GPU."""
        words = self._words[: self.size].tolist()
        if not any(words):
            return None
        first = next(word for word in words if word)
        ranks = [rank for rank, word in enumerate(words) if word]
        return Late(ranks, self._peers.KINDS[first >> 32], first & 0xFFFFFFFF)

    def stop(self) -> None:
        """Let no kernel wait any more, now or later; from any thread."""
        self._words[-1] = 1

    def close(self) -> None:
        """Unmap the peers' memory and free the own, once nobody uses it; the device has nothing queued here.

        Memory that a peer may still have mapped is left to the end of the process.
        """
        own, self._own = self._own, 0
        try:
            self._say("done", CLOSE_S)
            self._unmap()
            self._say("unmapped", CLOSE_S)
            if own:
                self._peers.free(own)
            self._leave()
        except RuntimeError as error:  # CommError, or CUDA's
            log.warning("what is still mapped is left to the end of the process: %s", error)

    def _say(self, topic: str, timeout_s: float) -> None:
        exchange(self._store, f"arena/{topic}", "", self.rank, self.size, timeout_s)

    def _leave(self) -> None:
        """Rank 0, whose process may serve the store, leaves last."""
        if self.rank == 0:
            self._say("left", CLOSE_S)
        else:
            self._store.set(f"arena/left/{self.rank}", "")

    def _unmap(self) -> None:
        while self._mapped:
            self._peers.unmap(self._mapped.pop())

    def _map(self, handle: bytes) -> int:
        self._mapped.append(self._peers.map_memory(handle, self._device.index))
        return self._mapped[-1]

    def _take(self) -> int:
        return self._turns.take(self._peers.capture())

    def _slot(self, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start = self._peers.HEADER_BYTES + slot * self.slot_bytes
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        assert nbytes <= self.slot_bytes, "the policy sends larger ones elsewhere"
        found: Tensor = self._bytes[start : start + nbytes].view(dtype)
        return found.view(shape)


def join(
    store: Store,
    rank: int,
    size: int,
    *,
    device: torch.device,
    slot_bytes: int,
    shares_device: bool,
    timeout_s: float,
) -> PeerBuffers:
    """This rank's arena, mapped and tried by all ranks; slot_bytes is a multiple of 16 and equal on all of them.

    Raises NotShared, on every rank with the same reason, if any of them cannot; CommError if one says nothing.
    """
    arena = PeerBuffers(
        rank,
        size,
        store=store,
        device=device,
        slot_bytes=slot_bytes,
        shares_device=shares_device,
        timeout_s=timeout_s,
    )

    def agree(topic: str, step: Callable[[], str]) -> list[str]:
        return _agree(exchange(store, f"arena/{topic}", _try(step), rank, size, timeout_s))

    try:
        hosts = agree("host", lambda: BOOT_ID.read_text().strip())
        if len(set(hosts)) > 1:
            raise NotShared("the ranks are on several hosts")
        offers = agree("offer", arena.offer)
        agree("map", lambda: arena.map(offers))
        for turn in range(2):  # what was read once may have been kept
            agree(f"greet {turn}", partial(arena.greet, turn))
        arena.set_patience(arena.patience_s)
    except NotShared:
        arena.close()
        raise
    return arena


def _try(step: Callable[[], str]) -> str:
    """What `step` says after a plus, or why it cannot, after a minus."""
    try:
        return "+" + step()
    except (RuntimeError, ImportError, OSError) as error:
        return "-" + _first_line(error)


def _agree(words: list[str]) -> list[str]:
    """What the ranks have said; raises NotShared if one of them cannot."""
    refusals = [f"rank {rank}: {word[1:]}" for rank, word in enumerate(words) if word[0] == "-"]
    if refusals:
        raise NotShared("; ".join(refusals))
    return [word[1:] for word in words]


def _pattern(seed: int) -> Tensor:
    """4 KiB of bytes that no other rank or turn has."""
    return torch.randint(0, 256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _names(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def _peers() -> ModuleType:
    from ..kernels import peer_memory  # imports CuPy, which only machines with a GPU have

    return peer_memory
