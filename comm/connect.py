"""The constructor of a rank's communicator: NCCL and shared memory between GPUs, gloo between CPUs."""

from __future__ import annotations

import os

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .all_reduce_choice import AllReduce
from .base import CommError, Communicator, SingleRank
from .gloo import GlooCommunicator
from .nccl import NcclCommunicator
from .nccl_library import SHARED_GPU_SINCE, Nccl, NcclError, open_library, version_text
from .rendezvous import Rendezvous
from .shared_memory import share_memory


def connect(
    rank: int,
    size: int,
    *,
    store: Store | None,
    own_ip: str,
    device: torch.device,
    shares_device: bool = False,
    library: str | None = None,
    all_reduce: AllReduce = "nccl",
    batch_invariant: bool = False,
    timeout_s: float,
) -> Communicator:
    """Join a group of `size` ranks as `rank`; returns once all ranks have joined.

    store            the rendezvous, not needed for a single rank
    own_ip           the address of this rank's host that the others can reach
    shares_device    another rank may use the same GPU
    library          path of the libnccl to use between GPUs; torch's if None
    all_reduce       the algorithm of small all-reduces between GPUs; auto chooses by their size
    batch_invariant  between GPUs: sums are bitwise identical in any batch; raises CommError if that is impossible
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
    return share_memory(
        comm, all_reduce, rendezvous, batch_invariant=batch_invariant, device=device, shares_device=shares_device
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
        raise NcclError(
            f"the ranks differ: {listed}; give all of them the same libnccl and the same NCCL_* environment"
        )
