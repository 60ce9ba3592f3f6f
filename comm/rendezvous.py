"""The rendezvous of the ranks: a key-value store on rank 0 through which they exchange addresses and handles."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import CommError
from .nccl_library import NcclError


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


def exchange(store: Store, topic: str, word: str, rank: int, size: int, timeout_s: float) -> list[str]:
    """What each rank says on `topic`, in rank order; raises NcclError naming who has said nothing within timeout_s."""
    keys = [f"{topic}/{other}" for other in range(size)]
    try:
        store.set(keys[rank], word)
        store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:  # torch's DistError
        raise NcclError(
            f"rank {rank} of {size}: no word within {timeout_s:.0f} s from {_silent(store, keys)}"
        ) from error


def _silent(store: Store, keys: list[str]) -> str:
    try:
        return "rank " + ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
    except RuntimeError:
        return "rank 0, which serves the rendezvous"
