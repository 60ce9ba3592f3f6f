"""Set up collectives over memory that all ranks of one host map, if they can share any.

All ranks go through the same steps. After each they exchange the results, so that all continue, or all stop with the
same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .all_reduce_choice import Algorithm, AllReduce
from .all_reduce_policy import SLOT_BYTES, Policy
from .autotune import autotune_all_reduce
from .base import CommError, Communicator, NotShared
from .error_text import first_line
from .nccl import NcclCommunicator
from .rendezvous import Rendezvous

if TYPE_CHECKING:
    from .symmetric import SymmetricCommunicator

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def share_memory(
    nccl: NcclCommunicator,
    all_reduce: AllReduce,
    rendezvous: Rendezvous,
    *,
    batch_invariant: bool = False,
    device: torch.device,
    shares_device: bool,
) -> Communicator:
    """Return a communicator with shared memory for small messages, or `nccl`, with the reason in its description.

    all_reduce       the algorithm of small all-reduces; auto times them, nccl shares no memory
    batch_invariant  all-reduces use one algorithm for any size; raises CommError if memory cannot be shared
    shares_device    the ranks may use one GPU together
    """
    if all_reduce == "nccl":
        return nccl
    try:
        comm = share_buffers(nccl, rendezvous, device=device, slot_bytes=SLOT_BYTES, shares_device=shares_device)
    except NotShared as reason:
        if batch_invariant:
            raise CommError(f"batch-invariant sums need memory that all ranks map: {reason}") from reason
        nccl.description += f"; no shared memory: {reason}"
        return nccl
    if batch_invariant:
        fixed = all_reduce if all_reduce != "auto" else "one-shot" if nccl.size == 2 else "two-shot"
        return comm.with_policy(Policy.only(fixed, slices=True))
    if all_reduce != "auto":
        return comm.with_policy(Policy.only(all_reduce))
    return _autotuned(nccl, comm, rendezvous, device)


def share_buffers(
    nccl: NcclCommunicator, rendezvous: Rendezvous, *, device: torch.device, slot_bytes: int, shares_device: bool
) -> SymmetricCommunicator:
    """Map and verify peer buffers on all ranks and return a communicator over them that sends all sums to NCCL.

    slot_bytes  largest message in a buffer: a multiple of 16, equal on all ranks
    Raises NotShared, on every rank with the same reason, if one rank cannot; CommError if one is silent.
    """
    hosts = _agree(rendezvous, "host", _host)
    if len(set(hosts)) > 1:
        raise NotShared("the ranks are on several hosts")
    from .peer_buffers import PeerBuffers
    from .symmetric import SymmetricCommunicator

    buffers = PeerBuffers(rendezvous, device=device, slot_bytes=slot_bytes, shares_device=shares_device)
    try:
        offers = _agree(rendezvous, "allocate", buffers.allocate)
        _agree(rendezvous, "map", lambda: buffers.map(offers))
        for turn in range(2):  # the second turn finds stale copies of the first
            _agree(rendezvous, f"verify {turn}", partial(buffers.verify, turn))
        buffers.set_timeout(buffers.timeout_s)
    except NotShared:
        buffers.close()
        raise
    return SymmetricCommunicator(nccl, buffers, Policy(()), device)


def _autotuned(
    nccl: NcclCommunicator, comm: SymmetricCommunicator, rendezvous: Rendezvous, device: torch.device
) -> Communicator:
    """Return a communicator with the fastest algorithm at each size, and the times in its description."""
    groups: dict[Algorithm, Communicator] = {"nccl": nccl}
    groups |= {algorithm: comm.with_policy(Policy.only(algorithm)) for algorithm in ("one-shot", "two-shot")}
    gpu = torch.cuda.get_device_properties(device)
    table = autotune_all_reduce(groups, f"{gpu.name} {gpu.uuid} {nccl.description}", rendezvous)
    tuned = comm.with_policy(Policy(tuple(table.thresholds())))
    tuned.description = "\n  ".join([tuned.description, *table.lines()])
    return tuned


def _host() -> str:
    """Return the identity of this host; raises ImportError if it has no CuPy."""
    from . import symmetric  # noqa: F401

    return BOOT_ID.read_text().strip()


def _agree(rendezvous: Rendezvous, topic: str, step: Callable[[], str]) -> list[str]:
    """Run a step on all ranks and return its results in rank order; raises NotShared if it fails on one of them."""
    results = rendezvous.exchange(f"shared memory/{topic}", _attempt(step))
    failures = [f"rank {rank}: {result[1:]}" for rank, result in enumerate(results) if result[0] == "-"]
    if failures:
        raise NotShared("; ".join(failures))
    return [result[1:] for result in results]


def _attempt(step: Callable[[], str]) -> str:
    """Return the step's result after a plus, or the reason of its failure after a minus."""
    try:
        return "+" + step()
    except (RuntimeError, ImportError, OSError) as error:
        return "-" + first_line(error)
