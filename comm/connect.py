"""The constructor of a rank's communicator: NCCL and peer memory between GPUs, gloo between CPUs.

Ranks of one host set up peer memory in the same steps. After each they exchange the results, so that all continue,
or all stop with the same reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .all_reduce_check import RowShape, wrong_algorithms
from .all_reduce_names import PEER_ALGORITHMS, AllReduceAlgorithm, AllReduceChoice
from .all_reduce_policy import BUFFER_BYTES, COLUMNS, AllReducePolicy, autotune_all_reduce
from .base import CommError, Communicator, PeerMemoryUnavailable, SingleRank
from .gloo import GlooCommunicator
from .message_text import first_line
from .nccl import NcclCommunicator
from .nccl_library import SHARED_GPU_SINCE, Nccl, NcclError, open_library, version_text
from .rendezvous import Rendezvous

if TYPE_CHECKING:
    from .symmetric import SymmetricCommunicator

log = logging.getLogger(__name__)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def connect(
    rank: int,
    size: int,
    *,
    store: Store | None,
    own_ip: str,
    device: torch.device,
    shares_device: bool = False,
    library: str | None = None,
    all_reduce: AllReduceChoice = "nccl",
    batch_invariant: bool = False,
    hidden_size: int = COLUMNS,
    dtype: torch.dtype = torch.bfloat16,
    timeout_s: float,
) -> Communicator:
    """Join a group of `size` ranks as `rank`; returns once all ranks have joined.

    store            the rendezvous, not needed for a single rank
    own_ip           the address of this rank's host that the others can reach
    shares_device    another rank may use the same GPU
    library          path of the libnccl to use between GPUs; torch's if None
    all_reduce       the algorithm of small all-reduces between GPUs; auto chooses by their size
    batch_invariant  set by --deterministic: sums are bitwise identical in any batch; else raises CommError
    hidden_size      columns of the rows that the model sums, of `dtype`; all-reduce kernels are checked with such rows
    timeout_s        deadline of joining and of each collective; raises CommError after it
    """
    if size == 1:
        return SingleRank()
    assert store is not None, "ranks find each other through a rendezvous"
    rendezvous = Rendezvous(store, rank, size, timeout_s)
    if device.type != "cuda":
        return GlooCommunicator(rendezvous, own_ip=own_ip)
    nccl = open_library(library)
    obstacle = _obstacle_to_sharing(nccl) if shares_device else ""
    _require_equal(rendezvous.exchange("choice", "gloo" if obstacle else str(nccl)))
    if obstacle and batch_invariant:
        raise CommError(f"sums cannot be batch invariant: {obstacle}")
    if obstacle:
        return GlooCommunicator(rendezvous, own_ip=own_ip, reason=obstacle)
    blocks = _blocks_per_rank(device, size) if shares_device else None
    comm = NcclCommunicator(rendezvous, nccl=nccl, device=device, max_blocks=blocks)
    return with_peer_memory(
        comm,
        all_reduce,
        rendezvous,
        batch_invariant=batch_invariant,
        shape=RowShape(hidden_size, dtype, device),
        shares_device=shares_device,
    )


def _obstacle_to_sharing(nccl: Nccl) -> str:
    """Return why ranks that share a GPU cannot use NCCL; empty if they can."""
    if nccl.version < SHARED_GPU_SINCE:
        return f"the ranks share a GPU, which needs NCCL {version_text(SHARED_GPU_SINCE)} and this is {nccl}"
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return f"the ranks share a GPU, which {nccl} allows with NCCL_MULTI_RANK_GPU_ENABLE=1 only"
    return ""


def _blocks_per_rank(device: torch.device, ranks: int) -> int:
    """Return the most blocks of a kernel of one of the ranks on a GPU, so that half of the GPU stays free.

    Otherwise waiting blocks can keep the kernels that they wait for from running: four ranks with NCCL's default hang.
    """
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // (2 * ranks))


def _require_equal(choices: list[str]) -> None:
    if len(set(choices)) > 1:
        listed = ", ".join(f"rank {rank} has {choice}" for rank, choice in enumerate(choices))
        raise NcclError(f"the ranks differ: {listed}; give them all the same libnccl and the same NCCL_* environment")


def with_peer_memory(
    nccl: NcclCommunicator,
    all_reduce: AllReduceChoice,
    rendezvous: Rendezvous,
    *,
    batch_invariant: bool = False,
    shape: RowShape,
    shares_device: bool,
) -> Communicator:
    """Return a communicator with peer memory for small messages, or `nccl`, with the reason in its description.

    The arguments are those of `connect`; "nccl" maps no peer memory. Batch-invariant sums have one order of additions.
    Raises CommError if an algorithm that the caller has chosen computes wrong sums; `auto` excludes it.
    """
    if all_reduce == "nccl":
        return nccl
    try:
        comm = map_peer_buffers(
            nccl, rendezvous, device=shape.device, buffer_bytes=BUFFER_BYTES, shares_device=shares_device
        )
    except PeerMemoryUnavailable as reason:
        if batch_invariant:
            raise CommError(f"batch-invariant sums need peer memory: {reason}") from reason
        nccl.description += f"; no peer memory: {reason}"
        return nccl
    comm.compile_sums(shape.columns, shape.dtype)
    if batch_invariant:
        return _checked(
            nccl, comm.with_policy(AllReducePolicy.batch_invariant(all_reduce, nccl.size)), rendezvous, shape
        )
    if all_reduce != "auto":
        return _checked(nccl, comm.with_policy(AllReducePolicy.only(all_reduce)), rendezvous, shape)
    return _autotuned(nccl, comm, rendezvous, shape)


def map_peer_buffers(
    nccl: NcclCommunicator, rendezvous: Rendezvous, *, device: torch.device, buffer_bytes: int, shares_device: bool
) -> SymmetricCommunicator:
    """Map and verify peer buffers on all ranks and return a communicator over them that sends all sums to NCCL.

    buffer_bytes  largest message in a peer buffer: a multiple of 16, equal on all ranks
    Raises PeerMemoryUnavailable, on every rank with the same reason, if one rank cannot; CommError if one is silent.
    """
    hosts = _agree(rendezvous, "host", _host)
    if len(set(hosts)) > 1:
        raise PeerMemoryUnavailable("the ranks are on several hosts")
    from .peer_buffers import PeerBuffers
    from .symmetric import SymmetricCommunicator

    buffers = PeerBuffers(rendezvous, device=device, buffer_bytes=buffer_bytes, shares_device=shares_device)
    try:
        handles = _agree(rendezvous, "allocate", buffers.allocate)
        _agree(rendezvous, "map", lambda: buffers.map(handles))
        for turn in range(2):  # in the second turn a peer that maps a copy still returns the first pattern
            _agree(rendezvous, f"verify {turn}", partial(buffers.verify, turn))
        buffers.set_timeout(buffers.timeout_s)
    except PeerMemoryUnavailable:
        buffers.close()
        raise
    return SymmetricCommunicator(nccl, buffers, AllReducePolicy(()), device)


def _checked(
    nccl: NcclCommunicator, comm: SymmetricCommunicator, rendezvous: Rendezvous, shape: RowShape
) -> SymmetricCommunicator:
    wrong = wrong_algorithms(comm, nccl, comm.policy, rendezvous, shape)
    if wrong:
        raise CommError("; ".join(_exclusions(wrong)) + "; choose another one with --all-reduce")
    return comm


def _autotuned(
    nccl: NcclCommunicator, comm: SymmetricCommunicator, rendezvous: Rendezvous, shape: RowShape
) -> Communicator:
    """Return the communicator with the fastest algorithm for each size, of those that compute the sums of NCCL."""
    groups: dict[AllReduceAlgorithm, Communicator] = {"nccl": nccl}
    groups |= {algorithm: comm.with_policy(AllReducePolicy.only(algorithm)) for algorithm in PEER_ALGORITHMS}
    comm.compile_sums(COLUMNS, torch.bfloat16)  # which it times
    gpu = torch.cuda.get_device_properties(shape.device)
    table = autotune_all_reduce(groups, f"{gpu.name} {gpu.uuid} {nccl.description}", rendezvous)
    notes: list[str] = []
    for attempt in range(len(groups)):  # each excludes at least one, and never NCCL
        tuned = comm.with_policy(AllReducePolicy.auto(table))
        wrong = wrong_algorithms(tuned, nccl, tuned.policy, rendezvous, shape, attempt)
        if not wrong:
            break
        table = table.without(wrong)
        notes += _exclusions(wrong)
    for note in notes:
        log.warning("%s; it is not used", note)
    tuned.description = "\n  ".join([tuned.description, *table.lines(), *notes])
    return tuned


def _exclusions(wrong: dict[AllReduceAlgorithm, str]) -> list[str]:
    return [f"all-reduce {name} computes other sums than NCCL on these GPUs ({fault})" for name, fault in wrong.items()]


def _host() -> str:
    """Return the identity of this host; raises ImportError if it has no CuPy."""
    from . import symmetric  # noqa: F401

    return BOOT_ID.read_text().strip()


def _agree(rendezvous: Rendezvous, topic: str, step: Callable[[], str]) -> list[str]:
    """Run a step on all ranks and return the results in rank order; raises PeerMemoryUnavailable if one rank fails."""
    try:
        result = "+" + step()
    except (RuntimeError, ImportError, OSError) as error:
        result = "-" + first_line(error)
    results = rendezvous.exchange(f"peer memory/{topic}", result)
    failures = [f"rank {rank}: {result[1:]}" for rank, result in enumerate(results) if result[0] == "-"]
    if failures:
        raise PeerMemoryUnavailable("; ".join(failures))
    return [result[1:] for result in results]
