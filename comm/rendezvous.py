"""The rendezvous of the ranks: a key-value store, through which they exchange addresses and handles.

There is no server. Each rank keeps all values, and sends its own to the inbox of every other rank. Only a holder of an
inbox's key can write to it; nobody can read from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import msgspec
from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from .base import CommError
from .message_sockets import Address, PullSocket, PushSocket


class RankStore(Store):
    """One rank's part of the store. Call `join` with the addresses of all ranks before any other method.

    gloo uses it from C++, as a Store of torch; `add`, `delete_key` and other changes of a value are not supported.
    """

    def __init__(self, ip: str) -> None:
        super().__init__()
        self._inbox, self._peers = PullSocket(ip), list[PushSocket]()
        self._values: dict[str, bytes] = {}
        self._lock = threading.RLock()  # a socket must not be used by two threads at once
        self._timeout_s = 0.0
        self.address = self._inbox.address

    def join(self, rank: int, addresses: Sequence[Address], timeout_s: float) -> None:
        """Connect to the other ranks' stores, given in rank order; each wait for a value ends after timeout_s."""
        self._timeout_s = timeout_s
        self._peers = [PushSocket(address) for peer, address in enumerate(addresses) if peer != rank]

    def set(self, key: str, value: bytes | str) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        message = msgspec.msgpack.encode((key, value))
        with self._lock:
            self._values[key] = value
            for peer in self._peers:
                peer.send(message)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: Sequence[str]) -> bool:
        return not self._missing(keys, 0)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values; raises CommError after `timeout`, by default that of `join`."""
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline = time.monotonic() + timeout_s
        while missing := self._missing(keys, deadline - time.monotonic()):
            if time.monotonic() >= deadline:
                raise CommError(f"no value within {timeout_s:.0f} s for {', '.join(missing)}")

    def close(self) -> None:
        """Close the sockets; safe to call twice."""
        with self._lock:
            self._inbox.close()
            for peer in self._peers:
                peer.close()

    def _missing(self, keys: Sequence[str], timeout_s: float) -> list[str]:
        """Return the keys without a value; if there are any, wait up to timeout_s for one message."""
        with self._lock:
            if all(key in self._values for key in keys):
                return []
            for message in self._inbox.receive(max(0.0, timeout_s)):
                key, self._values[key] = msgspec.msgpack.decode(message, type=tuple[str, bytes])
            return [key for key in keys if key not in self._values]


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
        self.store.set(keys[self.rank], message)
        try:
            self.store.wait(keys, timedelta(seconds=timeout_s))
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:
            silent = ", ".join(str(rank) for rank, key in enumerate(keys) if not self.store.check([key]))
            reason = f"no message within {timeout_s:.0f} s from rank {silent}"
            raise CommError(f"rank {self.rank} of {self.size}: {reason}") from error
