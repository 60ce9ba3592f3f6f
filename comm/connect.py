"""The one place where a rank gets its communicator.

Rank 0 opens a rendezvous on its host; its port travels to the others by whatever started them.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import CommError, Communicator, SingleRank
from .torch_group import Backend, TorchCommunicator


def open_rendezvous(own_ip: str, timeout_s: float) -> TCPStore:
    """A rendezvous served by this process on a free port (`.port`); waits for others end after timeout_s."""
    return TCPStore(own_ip, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_rendezvous(address: tuple[str, int], rank: int, timeout_s: float) -> TCPStore:
    """The rendezvous that rank 0 serves at (host, port); raises CommError naming it if it cannot be reached."""
    try:
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CommError(f"rank {rank} could not reach rank 0 at {address[0]}:{address[1]}: {reason}") from error


def connect(
    rank: int,
    size: int,
    *,
    store: Store | None,
    own_ip: str,
    device: torch.device,
    shares_device: bool = False,
    timeout_s: float,
) -> Communicator:
    """Join a group of `size` ranks as `rank`; returns once all are there.

    store          the rendezvous, not needed for a single rank
    own_ip         the address of this rank's host that the others can reach
    shares_device  another rank may use the same GPU
    timeout_s      deadline of joining and of each collective; CommError after it
    """
    if size == 1:
        return SingleRank()
    assert store is not None, "ranks meet at a rendezvous"
    backend: Backend = "nccl" if device.type == "cuda" and not shares_device else "gloo"
    return TorchCommunicator(rank, size, store=store, own_ip=own_ip, backend=backend, timeout_s=timeout_s)
