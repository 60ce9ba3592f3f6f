"""FlashInfer's all-reduce as a baseline: the one-shot kernel that it has from vLLM, over a table of plain pointers.

It uses no NVLink multicast. Imports CuPy, so only ranks on GPUs import this module.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from ...comm.peer_buffers import whole_granules
from ...comm.rendezvous import Rendezvous
from ...kernels import peer_memory
from .comm_algorithms import AllReduceAlgorithm, TimedCall, Unavailable

MAX_BLOCKS = 36
RANK_DATA_BYTES = 8 << 20  # where the kernel keeps pointers, 64 bytes for each call in a graph


class FlashInferAllReduce(AllReduceAlgorithm):
    """The kernel that FlashInfer has from vLLM: one-shot for two ranks, and for more up to 512 or 256 KiB."""

    name = "flashinfer"

    def __init__(self, rendezvous: Rendezvous, device: torch.device, max_bytes: int) -> None:
        if rendezvous.size % 2:
            raise Unavailable("its kernel takes an even number of ranks")
        self._rendezvous, self._device_index, self._max_bytes = rendezvous, device.index or 0, max_bytes
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # FlashInfer's library uses its symbols without a link
        self._vllm_ar: Any = importlib.import_module("flashinfer.comm.vllm_ar")
        self._mapped: list[int] = []
        signals, _, self._signal_address = self._share("signals", self._vllm_ar.meta_size() + max_bytes)
        buffers, self._buffer, self._buffer_address = self._share("buffers", max_bytes)
        self._rank_data = torch.empty(RANK_DATA_BYTES, dtype=torch.uint8, device=device)
        self._handle = self._vllm_ar.init_custom_ar(signals, self._rank_data, rendezvous.rank, True)
        self._vllm_ar.register_buffer(self._handle, buffers)
        self._captures = 0

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        if count * dtype.itemsize % 16:
            return None
        registered = self._buffer[: count * dtype.itemsize].view(dtype)
        x = registered if in_place else torch.zeros_like(registered)
        copy_target = (0, 0) if in_place else (self._buffer_address, self._max_bytes)

        def call(values: Tensor | None) -> list[Tensor]:
            if values is not None:
                x.copy_(values)
            out = torch.empty_like(x)
            self._vllm_ar.all_reduce(self._handle, x, out, *copy_target, MAX_BLOCKS)
            return [out]

        return TimedCall(call, self._register_captured)

    def close(self) -> None:
        self._vllm_ar.dispose(self._handle)
        for address in self._mapped:
            peer_memory.unmap(address)
        self._rendezvous.exchange("flashinfer/unmapped")
        for address in (self._buffer_address, self._signal_address):
            peer_memory.free(address)

    def _register_captured(self) -> None:
        """Exchange the addresses of the memory that the captured calls read."""
        handles, offsets = self._vllm_ar.get_graph_buffer_ipc_meta(self._handle)
        self._captures += 1
        message = bytes(byte & 0xFF for byte in handles).hex() + " " + ",".join(map(str, offsets))
        messages = [m.split(" ") for m in self._rendezvous.exchange(f"flashinfer/graph {self._captures}", message)]
        self._vllm_ar.register_graph_buffers(
            self._handle,
            [list(bytes.fromhex(handle)) for handle, _ in messages],
            [[int(offset) for offset in listed.split(",")] for _, listed in messages],
        )

    def _share(self, topic: str, nbytes: int) -> tuple[list[int], Tensor, int]:
        """Allocate memory on every rank; returns all addresses in this process, this rank's bytes and its address."""
        address, memory = peer_memory.allocate(whole_granules(nbytes), self._device_index)
        handles = self._rendezvous.exchange(f"flashinfer/{topic}", peer_memory.export(address).hex())
        addresses = []
        for peer, handle in enumerate(handles):
            if peer != self._rendezvous.rank:
                self._mapped.append(peer_memory.map_memory(bytes.fromhex(handle), self._device_index))
            addresses.append(address if peer == self._rendezvous.rank else self._mapped[-1])
        return addresses, memory, address
