"""The one place where a rank gets its communicator: NCCL and shared memory between GPUs, gloo between CPUs.

Rank 0 opens a rendezvous on its host; its port travels to the others by whatever started them.
"""

from __future__ import annotations

import os

import torch
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import CommError, Communicator, SingleRank
from .gloo import GlooCommunicator
from .nccl import NcclCommunicator
from .nccl_library import SHARED_GPU_SINCE, Nccl, NcclError, open_library, version_text
from .rendezvous import exchange
from .symmetric import AllReduce, share_memory


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
    """Join a group of `size` ranks as `rank`; returns once all are there.

    store          the rendezvous, not needed for a single rank
    own_ip         the address of this rank's host that the others can reach
    shares_device  another rank may use the same GPU
    library        path of the libnccl to use between GPUs; torch's own if None
    all_reduce     between GPUs: who adds up small messages; auto chooses by their size
    batch_invariant  between GPUs: a sum over ranks has the same bits in any batch; CommError where it cannot
    timeout_s      deadline of joining and of each collective; CommError after it
    """
    if size == 1:
        return SingleRank()
    assert store is not None, "ranks meet at a rendezvous"
    if device.type != "cuda":
        return GlooCommunicator(rank, size, store=store, own_ip=own_ip, timeout_s=timeout_s)
    nccl = open_library(library)
    why_not = _why_not_nccl(nccl) if shares_device else ""
    _agree(exchange(store, "choice", "gloo" if why_not else str(nccl), rank, size, timeout_s))
    if why_not and batch_invariant:
        raise CommError(f"sums cannot be the same in any batch: {why_not}")
    if why_not:
        return GlooCommunicator(rank, size, store=store, own_ip=own_ip, timeout_s=timeout_s, why=why_not)
    blocks = _share_of_blocks(device, size) if shares_device else None
    group = NcclCommunicator(rank, size, store=store, nccl=nccl, device=device, timeout_s=timeout_s, max_blocks=blocks)
    return share_memory(
        group,
        all_reduce,
        batch_invariant=batch_invariant,
        store=store,
        device=device,
        shares_device=shares_device,
        timeout_s=timeout_s,
    )


def _why_not_nccl(nccl: Nccl) -> str:
    """Why ranks that share a GPU cannot use NCCL; empty if they can."""
    if nccl.version < SHARED_GPU_SINCE:
        return f"the ranks share a GPU, which needs NCCL {version_text(SHARED_GPU_SINCE)} and this is {nccl}"
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return f"the ranks share a GPU, which {nccl} allows with NCCL_MULTI_RANK_GPU_ENABLE=1 only"
    return ""


def _share_of_blocks(device: torch.device, ranks: int) -> int:
    """Blocks that a rank may have waiting on a GPU that others use: half of the GPU stays free for those.

    Else those that wait can keep from running whom they wait for: four ranks with NCCL's own choice hang.
    """
    return max(1, torch.cuda.get_device_properties(device).multi_processor_count // (2 * ranks))


def _agree(choices: list[str]) -> None:
    if len(set(choices)) > 1:
        told = ", ".join(f"rank {rank} has {choice}" for rank, choice in enumerate(choices))
        raise NcclError(f"the ranks differ: {told}; give all of them the same libnccl and the same NCCL_* environment")
