"""All-reduces of torch, as baselines: torch.distributed, and the kernels over torch's symmetric memory.

None of them uses NVLink multicast.
"""

from __future__ import annotations

import importlib
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not in its stubs

from ...comm.rendezvous import Rendezvous
from .comm_algorithms import AllReduceAlgorithm, TimedCall, Unavailable, on_values


class TorchDistributedAllReduce(AllReduceAlgorithm):
    """`torch.distributed.all_reduce` over NCCL, or over gloo on CPUs; makes this process's default group."""

    name = "torch.distributed"

    def __init__(self, rendezvous: Rendezvous, device: torch.device, own_ip: str) -> None:
        cuda = device.type == "cuda"
        self.capturable, self.device = cuda, device
        if not cuda and own_ip == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo's default resolves the host's name
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore("torch.distributed", rendezvous.store),
            rank=rendezvous.rank,
            world_size=rendezvous.size,
            timeout=timedelta(seconds=rendezvous.timeout_s),
            device_id=device if cuda else None,
        )

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        if not in_place:
            return None
        x = torch.zeros(count, dtype=dtype, device=self.device)

        def all_reduce() -> Tensor:
            dist.all_reduce(x)
            return x

        return on_values(x, all_reduce)

    def close(self) -> None:
        dist.destroy_process_group()


class TorchSymmetricAllReduce(AllReduceAlgorithm):
    """The kernels of torch over its symmetric memory; needs the default group of TorchDistributedAllReduce."""

    def __init__(
        self, shots: str, rendezvous: Rendezvous, device: torch.device, dtype: torch.dtype, max_bytes: int
    ) -> None:
        self.name = f"torch symmetric {shots}"
        if not dist.is_initialized():
            raise Unavailable("torch.distributed has no group here")
        memory: Any = importlib.import_module("torch.distributed._symmetric_memory")
        self._one_shot = shots == "one-shot"
        self._group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        self._buffer: Tensor = memory.empty(max_bytes // dtype.itemsize, dtype=dtype, device=device)
        memory.rendezvous(self._buffer, self._group)
        self._buffer.zero_()
        self._alignment = 16 * rendezvous.size  # bytes: each rank's share is a whole number of vectors

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        if count * dtype.itemsize % self._alignment:
            return None
        x, ordinary = self._buffer[:count], torch.zeros_like(self._buffer[:count])
        ops = torch.ops.symm_mem

        def all_reduce() -> Tensor:
            if not in_place:
                x.copy_(ordinary)
            if self._one_shot:
                return ops.one_shot_all_reduce(x, "sum", self._group)  # type: ignore[no-any-return]
            return ops.two_shot_all_reduce_(x, "sum", self._group)  # type: ignore[no-any-return]

        return on_values(x if in_place else ordinary, all_reduce)

    def close(self) -> None:
        del self._buffer
