"""Collectives over torch's gloo: between CPUs, and between ranks that share a GPU where NCCL cannot.

On a GPU it copies through the host. The group is made directly, not through `torch.distributed.init_process_group`, so
that nothing is global: a process may hold several ranks or groups. Ranks find each other through a TCP store that
rank 0 serves.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .base import CommError, Communicator
from .timers import coarse_timers

LOOP_SLACK_S = 0.2  # gloo's thread looks every 10 ms whether it is to end: most of what an idle rank costs


class GlooCommunicator(Communicator):
    """One rank; see `connect` in connect.py for the arguments. `why` goes into the description."""

    capturable = False

    def __init__(self, rank: int, size: int, *, store: Any, own_ip: str, timeout_s: float, why: str = "") -> None:
        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        timeout = timedelta(seconds=timeout_s)
        try:
            self._group = _gloo(store, rank, size, own_ip, timeout)
        except RuntimeError as error:
            raise CommError(f"rank {rank} of {size} could not join the group: {str(error).splitlines()[0]}") from error
        self.description = f"gloo through torch, {size} ranks{why and f': {why}'}"

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._wait("all_reduce", self._group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        self._wait("all_gather", self._group.allgather([list(out.unbind(0))], [x.contiguous()]))
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)[self.rank].clone()

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = root
        self._wait("broadcast", self._group.broadcast([x], options))
        return x

    def barrier(self) -> None:
        self._wait("barrier", self._group.barrier())

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.shutdown()

    def _wait(self, operation: str, work: dist.Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise CommError(
                f"rank {self.rank} of {self.size}: {operation} failed or took longer than {self._timeout_s:.0f} s:"
                f" {str(error).splitlines()[0]}"
            ) from error


def _gloo(store: Any, rank: int, size: int, own_ip: str, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch.distributed builds it the same way
    # By address, unless the user names an interface: gloo's own choice resolves the host's name, which fails on
    # machines without a DNS entry for it.
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    chosen = {"interface": interface} if interface else {"hostname": own_ip}
    with coarse_timers(LOOP_SLACK_S):
        options._devices = [dist.ProcessGroupGloo.create_device(**chosen)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)
