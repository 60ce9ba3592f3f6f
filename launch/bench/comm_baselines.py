"""All-reduces that are not ours, for comparison: torch.distributed, torch's symmetric memory, FlashInfer's one-shot.

None of them may use NVLink multicast: of FlashInfer the kernel that it has from vLLM is called through a table of
plain pointers, of torch the one- and two-shot kernels.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # exported, but not in its stubs

from ...comm.rendezvous import exchange
from .comm_algorithms import Algorithm, Case, Unavailable

MAX_BLOCKS = 36  # of FlashInfer's kernel
RANK_DATA_BYTES = 8 << 20  # where it keeps pointers, 64 bytes for each call in a graph
GRANULE = 2 << 20  # smaller allocations may share an exported block with others


@dataclass(frozen=True)
class BaselineContext:
    """Where a rank is, and how it finds the others."""

    rank: int
    size: int
    store: Store
    device: torch.device
    timeout_s: float

    def exchange(self, topic: str, word: str) -> list[str]:
        return exchange(self.store, topic, word, self.rank, self.size, self.timeout_s)


class TorchDistributed(Algorithm):
    """`torch.distributed.all_reduce` over NCCL, or over gloo on CPUs; makes this process's default group."""

    name = "torch.distributed"

    def __init__(self, place: BaselineContext, own_ip: str) -> None:
        cuda = place.device.type == "cuda"
        self.capturable, self.device = cuda, place.device
        if not cuda and own_ip == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # its own choice resolves the host's name
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=PrefixStore("torch.distributed", place.store),
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=place.timeout_s),
            device_id=place.device if cuda else None,
        )

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        if not in_place:
            return None
        x = torch.zeros(count, dtype=dtype, device=self.device)

        def call(values: Tensor | None) -> list[Tensor]:
            if values is not None:
                x.copy_(values)
            dist.all_reduce(x)
            return [x]

        return Case(call)

    def close(self) -> None:
        dist.destroy_process_group()


class TorchSymmetric(Algorithm):
    """torch's own kernels over its symmetric memory; needs the default group of TorchDistributed."""

    def __init__(self, shots: str, place: BaselineContext, dtype: torch.dtype, max_bytes: int) -> None:
        self.name = f"torch symmetric {shots}"
        if not dist.is_initialized():
            raise Unavailable("torch.distributed has no group here")
        memory: Any = importlib.import_module("torch.distributed._symmetric_memory")
        self._one_shot = shots == "one-shot"
        self._group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        self._whole: Tensor = memory.empty(max_bytes // dtype.itemsize, dtype=dtype, device=place.device)
        memory.rendezvous(self._whole, self._group)
        self._whole.zero_()
        self._aligned = 16 * place.size  # bytes: a rank's share, in whole vectors

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        if count * dtype.itemsize % self._aligned:
            return None
        x, elsewhere = self._whole[:count], torch.zeros_like(self._whole[:count])
        ops = torch.ops.symm_mem

        def call(values: Tensor | None) -> list[Tensor]:
            if values is not None:
                (x if in_place else elsewhere).copy_(values)
            if not in_place:
                x.copy_(elsewhere)
            if self._one_shot:
                return [ops.one_shot_all_reduce(x, "sum", self._group)]
            return [ops.two_shot_all_reduce_(x, "sum", self._group)]

        return Case(call)

    def close(self) -> None:
        del self._whole


class FlashInfer(Algorithm):
    """The kernel that FlashInfer has from vLLM: one-shot for two ranks, and for more up to 512 or 256 KiB."""

    name = "flashinfer"

    def __init__(self, place: BaselineContext, max_bytes: int) -> None:
        from ...kernels import peer_memory

        if place.size % 2:
            raise Unavailable("its kernel takes an even number of ranks")
        self._peers, self._place, self._max_bytes = peer_memory, place, max_bytes
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # whose symbols FlashInfer's library wants, unlinked
        self._ar: Any = importlib.import_module("flashinfer.comm.vllm_ar")
        self._mapped: list[int] = []
        signals, _, self._signals = self._share("signals", self._ar.meta_size() + max_bytes)
        buffers, self._buffer, self._own = self._share("buffers", max_bytes)
        self._rank_data = torch.empty(RANK_DATA_BYTES, dtype=torch.uint8, device=place.device)
        self._handle = self._ar.init_custom_ar(signals, self._rank_data, place.rank, True)
        self._ar.register_buffer(self._handle, buffers)
        self._captures = 0

    def case(self, count: int, dtype: torch.dtype, *, in_place: bool) -> Case | None:
        if count * dtype.itemsize % 16:
            return None
        registered = self._buffer[: count * dtype.itemsize].view(dtype)
        x = registered if in_place else torch.zeros_like(registered)
        copies_to = (0, 0) if in_place else (self._own, self._max_bytes)

        def call(values: Tensor | None) -> list[Tensor]:
            if values is not None:
                x.copy_(values)
            out = torch.empty_like(x)
            self._ar.all_reduce(self._handle, x, out, *copies_to, MAX_BLOCKS)
            return [out]

        return Case(call, self._register)

    def close(self) -> None:
        self._ar.dispose(self._handle)
        for pointer in self._mapped:
            self._peers.unmap(pointer)
        self._place.exchange("flashinfer/unmapped", "")
        for pointer in (self._own, self._signals):
            self._peers.free(pointer)

    def _register(self) -> None:
        """Tell it where the peers have what the captured calls read."""
        handles, offsets = self._ar.get_graph_buffer_ipc_meta(self._handle)
        self._captures += 1
        word = bytes(byte & 0xFF for byte in handles).hex() + " " + ",".join(map(str, offsets))
        every = [w.split(" ") for w in self._place.exchange(f"flashinfer/graph {self._captures}", word)]
        self._ar.register_graph_buffers(
            self._handle,
            [list(bytes.fromhex(handle)) for handle, _ in every],
            [[int(offset) for offset in listed.split(",")] for _, listed in every],
        )

    def _share(self, topic: str, nbytes: int) -> tuple[list[int], Tensor, int]:
        """Memory of every rank at its address here, the own as bytes, and its address."""
        index, rank = self._place.device.index or 0, self._place.rank
        own, whole = self._peers.allocate(-(-nbytes // GRANULE) * GRANULE, index)
        found = []
        for peer, handle in enumerate(self._place.exchange(f"flashinfer/{topic}", self._peers.export(own).hex())):
            if peer != rank:
                self._mapped.append(self._peers.map_memory(bytes.fromhex(handle), index))
            found.append(own if peer == rank else self._mapped[-1])
        return found, whole, own
