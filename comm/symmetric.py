"""Collectives through the memory that the ranks of one host share, for what is small; the rest goes to NCCL.

An all-reduce of a decode step lasts a few microseconds, most of which NCCL spends on its protocol. Here the partial
sums already lie where the peers read them, and the residual stream and its norm are part of the same kernel.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from ..kernels import ops
from .autotune import SIZES, Algorithm, autotune_all_reduce, size_text
from .base import CommError, Communicator
from .nccl import Done, NcclCommunicator, _record
from .peer_buffers import NotShared, PeerBuffers, join
from .rendezvous import exchange

log = logging.getLogger(__name__)
AllReduce = Literal["auto", "nccl", "one-shot", "two-shot"]
SUMMED = (torch.float32, torch.bfloat16, torch.float16)
OWN: tuple[Literal["one-shot", "two-shot"], ...] = ("one-shot", "two-shot")
GATHER = 1 << 20  # bytes of each rank, up to which shared memory gathers them
LARGEST = SIZES[-1]  # bytes that a slot holds


@dataclass(frozen=True)
class Policy:
    """Which algorithm serves how many bytes; the same on all ranks."""

    steps: tuple[tuple[int, Algorithm], ...]  # up to so many bytes, ascending; NCCL beyond the last
    gather: int = GATHER
    slices: bool = False  # rows of more bytes than the last go one slice after the other instead

    @classmethod
    def only(cls, algorithm: Algorithm, largest: int = LARGEST, *, slices: bool = False) -> Policy:
        """This algorithm for all that fits into a slot, or for all."""
        return cls(((largest, algorithm),), min(GATHER, largest), slices)

    def algorithm(self, nbytes: int) -> Algorithm:
        return next((name for most, name in self.steps if nbytes <= most), "nccl")

    def sliced(self, x: Tensor) -> list[Tensor]:
        """The rows of x, in as many slices as this needs."""
        if not self.slices or x.nbytes <= self.steps[-1][0]:
            return [x]
        return list(x.split(self.steps[-1][0] // (x.nbytes // len(x))))

    def __str__(self) -> str:
        words = [f"{name} up to {size_text(most)}" for most, name in self.steps]
        if self.slices:
            return f"{words[-1]}, and in slices beyond"
        return ", ".join(words) + (" and NCCL beyond" if words else "NCCL for sums")


class SymmetricCommunicator(Communicator):
    """One rank. Sums of floats have the same bits on all ranks and in all runs; broadcasts are NCCL's."""

    capturable = True

    def __init__(self, nccl: NcclCommunicator, arena: PeerBuffers, policy: Policy, device: torch.device) -> None:
        self.rank, self.size = nccl.rank, nccl.size
        self.description = f"{nccl.description}; shared memory: {policy}"
        self._nccl, self._arena, self._policy, self._device = nccl, arena, policy, device
        self._step = 1  # steps are told apart by who waits for their results
        self._ended = False
        self._token = torch.zeros(16, dtype=torch.uint8, device=device)

    def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        nbytes = rows * columns * dtype.itemsize
        return self._arena.buffer((rows, columns), dtype) if self._algorithm(nbytes, dtype) != "nccl" else None

    def all_reduce(self, x: Tensor) -> Tensor:
        slices = self._policy.sliced(x)
        if len(slices) > 1:
            return torch.cat([self.all_reduce(part) for part in slices])
        self._check()
        algorithm = self._algorithm(x.nbytes, x.dtype)
        if algorithm == "nccl":
            return self._nccl.all_reduce(x)
        return self._arena.all_reduce(x.contiguous(), two_shot=algorithm == "two-shot")

    def all_gather(self, x: Tensor) -> Tensor:
        self._check()
        if 0 < x.nbytes <= self._policy.gather:
            return self._arena.all_gather(x.contiguous())
        return self._nccl.all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self._check()
        if self._algorithm(x.nbytes, x.dtype) == "nccl":
            return self._nccl.reduce_scatter(x)
        return self._arena.reduce_scatter(x.contiguous())

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        self._check()
        return self._nccl.broadcast(x, root)

    def barrier(self) -> None:
        self._check()
        self._arena.all_gather(self._token, kind="barrier")
        self._wait(_record(self._device))

    def all_reduce_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        slices = self._policy.sliced(x)
        if len(slices) > 1:
            parts = zip(slices, self._policy.sliced(residual), strict=True)
            return torch.cat([self.all_reduce_add_rms_norm(part, of, weight, eps) for part, of in parts])
        algorithm = self._algorithm(x.nbytes, x.dtype)
        if algorithm == "nccl" or not self._arena.fits_norm(x.shape[-1], x.dtype):
            return ops.add_rms_norm(self.all_reduce(x), residual, weight, eps)
        self._check()
        return self._arena.all_reduce_add_rms_norm(x, residual, weight, eps, two_shot=algorithm == "two-shot")

    def wait(self, done: Done) -> None:
        self._wait(done)
        self._step += 1

    def abort(self) -> None:
        self._ended = True
        self._arena.stop()
        self._nccl.abort()

    def close(self) -> None:
        """As NCCL's; then the arenas, which no kernel uses any more: none waits for longer than its deadline."""
        self._nccl.close()
        torch.cuda.synchronize(self._device)
        self._arena.close()

    def _algorithm(self, nbytes: int, dtype: torch.dtype) -> Algorithm:
        return self._policy.algorithm(nbytes) if nbytes > 0 and dtype in SUMMED else "nccl"

    def _wait(self, done: Done) -> None:
        self._nccl.wait(_Watched(done, self))
        self._check()  # kernels that have given up end as well, with garbage

    def _check(self) -> None:
        """Raises CommError, and ends the group, if the device has waited for a peer in vain."""
        late = self._arena.late()
        if late is not None:
            self.abort()
            raise CommError(
                f"rank {self.rank} of {self.size}: {late.kind} in step {self._step} has waited"
                f" {self._arena.patience_s:.1f} s for rank {', '.join(map(str, late.ranks))}, which is gone or silent"
                f" (round {late.round})"
            )
        if self._ended:
            raise CommError(f"rank {self.rank} of {self.size}: the group has ended")


@dataclass(frozen=True)
class _Watched:
    """`done`, whose every look raises if the device has given up."""

    done: Done
    comm: SymmetricCommunicator

    def query(self) -> bool:
        self.comm._check()
        return self.done.query()


def share_memory(
    nccl: NcclCommunicator,
    choice: AllReduce,
    *,
    batch_invariant: bool = False,
    store: Store,
    device: torch.device,
    shares_device: bool,
    timeout_s: float,
) -> Communicator:
    """The group with shared memory for small messages; NCCL alone, which says why, where the ranks cannot share any."""
    if choice == "nccl":
        return nccl
    try:
        arena = join(
            store,
            nccl.rank,
            nccl.size,
            device=device,
            slot_bytes=LARGEST,
            shares_device=shares_device,
            timeout_s=timeout_s,
        )
    except NotShared as reason:
        if batch_invariant:
            raise CommError(
                f"sums cannot be the same in any batch, which takes memory that all ranks map: {reason}"
            ) from reason
        nccl.description += f"; no shared memory: {reason}"
        return nccl
    if batch_invariant:
        name = choice if choice != "auto" else "one-shot" if nccl.size == 2 else "two-shot"
        return SymmetricCommunicator(nccl, arena, Policy.only(name, slices=True), device)
    own = {name: SymmetricCommunicator(nccl, arena, Policy.only(name), device) for name in OWN}
    if choice != "auto":
        return own[choice]

    def say(topic: str, word: str) -> list[str]:
        return exchange(store, f"choice/{topic}", word, nccl.rank, nccl.size, timeout_s)

    gpu = torch.cuda.get_device_properties(device)
    groups: dict[Algorithm, Communicator] = {"nccl": nccl, "one-shot": own["one-shot"], "two-shot": own["two-shot"]}
    table = autotune_all_reduce(groups, f"{gpu.name} {gpu.uuid} {nccl.description}", say)
    chosen = SymmetricCommunicator(nccl, arena, Policy(tuple(table.best())), device)
    chosen.description = "\n  ".join([chosen.description, *table.lines()])
    return chosen
