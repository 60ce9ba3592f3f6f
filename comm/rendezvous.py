"""The rendezvous of the ranks: a key-value store on rank 0, through which they exchange addresses and handles."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import CommError
from .message_text import first_line


def open_rendezvous(own_ip: str, timeout_s: float) -> TCPStore:
    """Serve a store from this process on a free port (`.port`); each wait for another rank ends after timeout_s."""
    return TCPStore(own_ip, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_rendezvous(address: tuple[str, int], rank: int, timeout_s: float) -> TCPStore:
    """Connect to the store of rank 0 at (host, port); raises CommError that names it if it cannot be reached."""
    try:
        return TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        message = f"rank {rank} could not reach rank 0 at {address[0]}:{address[1]}: {first_line(error)}"
        raise CommError(message) from error


@dataclass(frozen=True)
class Rendezvous:
    """One rank's access to the store, with the size of the group and the deadline of each exchange."""

    store: Store
    rank: int
    size: int
    timeout_s: float

    def exchange(self, topic: str, message: str = "", timeout_s: float | None = None) -> list[str]:
        """Post this rank's message on a topic and return the messages of all ranks, in rank order.

        Raises CommError that names the silent ranks after `timeout_s`, by default the group's deadline.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        try:
            self.post(topic, message)
            self.store.wait(keys, timedelta(seconds=timeout_s))
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:  # torch's DistError
            reason = f"no message within {timeout_s:.0f} s from {self._silent(keys)}"
            raise CommError(f"rank {self.rank} of {self.size}: {reason}") from error

    def post(self, topic: str, message: str = "") -> None:
        """Post this rank's message on a topic, and wait for no other rank."""
        self.store.set(f"{topic}/{self.rank}", message)

    def _silent(self, keys: list[str]) -> str:
        try:
            return "rank " + ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
        except RuntimeError:
            return "rank 0, which serves the rendezvous"
