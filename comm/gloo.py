"""Collectives over torch's gloo: between CPUs, and between ranks that share a GPU where NCCL does not support it.

Tensors on a GPU are copied through the host. The process group is made directly, not through
`torch.distributed.init_process_group`, so that nothing is global: a process may hold several ranks or groups.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .base import CommError, Communicator
from .message_text import first_line
from .rendezvous import Rendezvous


class GlooCommunicator(Communicator):
    """One rank of a gloo group; `reason`, if any, goes into the description."""

    capturable = False

    def __init__(self, rendezvous: Rendezvous, *, own_ip: str, reason: str = "") -> None:
        self.rank, self.size, self._timeout_s = rendezvous.rank, rendezvous.size, rendezvous.timeout_s
        try:
            self._group = _process_group(rendezvous, own_ip)
        except RuntimeError as error:
            raise CommError(f"{self._name} could not join the group: {first_line(error)}") from error
        self.description = f"gloo through torch, {self.size} ranks{reason and f': {reason}'}"

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._wait("all_reduce", self._group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        self._wait("all_gather", self._group.allgather([list(out.unbind(0))], [x.contiguous()]))
        return out

    def barrier(self) -> None:
        self._wait("barrier", self._group.barrier())

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.shutdown()

    @property
    def _name(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def _wait(self, operation: str, pending: dist.Work) -> None:
        started = time.perf_counter()
        try:
            pending.wait()
        except RuntimeError as error:
            reason = f"failed or took longer than {self._timeout_s:.0f} s: {first_line(error)}"
            raise CommError(f"{self._name}: {operation} {reason}") from error
        self.host_s += time.perf_counter() - started


def _process_group(rendezvous: Rendezvous, own_ip: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch.distributed builds it the same way
    # By address, unless the user names an interface: gloo's own choice resolves the host's name, which fails on
    # machines without a DNS entry for it.
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    address = {"interface": interface} if interface else {"hostname": own_ip}
    options._devices = [dist.ProcessGroupGloo.create_device(**address)]
    options._timeout = timedelta(seconds=rendezvous.timeout_s)
    return dist.ProcessGroupGloo(rendezvous.store, rendezvous.rank, rendezvous.size, options)
