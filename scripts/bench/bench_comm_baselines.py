"""All-reduces of other libraries between the ranks of `lockstep bench comm`, timed and checked the same way.

    python scripts/bench/bench_comm_baselines.py --tp 2 -b 1K -e 16M -f 4 [--algorithm flashinfer] [--device cpu]

The baselines are torch.distributed, NCCL's symmetric windows and FlashInfer's one-shot kernel. None of them uses
NVLink multicast. `--algorithm` may also name any algorithm of `lockstep bench comm`, and may be repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore

from lockstep.comm.nccl import NcclCommunicator
from lockstep.comm.nccl_library import WINDOW_SYMMETRIC
from lockstep.comm.rendezvous import Rendezvous
from lockstep.launch.bench.comm_actor import AllReduceAlgorithm, CommBenchActor, TimedCall
from lockstep.launch.bench.comm_command import byte_sizes, run_on_ranks
from lockstep.launch.bench.comm_report import ALGORITHMS, CommBenchSpec
from lockstep.runtime.config import Config

BASELINES = ("torch.distributed", "nccl window", "flashinfer")
MAX_BLOCKS = 36
RANK_DATA_BYTES = 8 << 20  # FlashInfer's kernel keeps pointers there, 64 bytes for each call in a graph


class BaselineActor(CommBenchActor):
    """A rank that can also run the baselines."""

    def make(self, name: str) -> AllReduceAlgorithm:
        if name == "torch.distributed":
            return TorchDistributedAllReduce(self._rendezvous, self._device, self._ip)
        if name == "nccl window":
            return NcclWindowAllReduce(self._require_nccl(), max(self.spec.sizes), self._device)
        if name == "flashinfer":
            return FlashInferAllReduce(self._rendezvous, self._device, max(self.spec.sizes))
        return super().make(name)


class TorchDistributedAllReduce(AllReduceAlgorithm):
    """`torch.distributed.all_reduce` over NCCL, or over gloo on CPUs; makes this process's default group."""

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


class NcclWindowAllReduce(AllReduceAlgorithm):
    """NCCL's symmetric kernels, on zeroed memory that all ranks have registered.

    Raises NcclError if the library has no windows. The memory is registered with the NCCL group of lockstep's
    communicator through private members, because the communicator offers no windows.
    """

    def __init__(self, comm: NcclCommunicator, max_bytes: int, device: torch.device) -> None:
        from lockstep.kernels import peer_memory  # imports CuPy

        self.comm, self._nccl = comm, comm._nccl
        lib, nbytes, memory, window = self._nccl.lib, 2 * max_bytes, ctypes.c_void_p(), ctypes.c_void_p()
        self._nccl.require("ncclMemAlloc", "ncclCommWindowRegister", "ncclCommWindowDeregister")
        self._nccl.check(lib.ncclMemAlloc(ctypes.byref(memory), nbytes), "ncclMemAlloc")
        self._address = memory.value
        register, out = lib.ncclCommWindowRegister, ctypes.byref(window)
        comm._run("window", lambda c: register(c, self._address, nbytes, out, WINDOW_SYMMETRIC))
        self._window = window.value or 0  # 0 if NCCL uses its ordinary kernels on the memory
        self._bytes = peer_memory.view(self._address, nbytes, device.index or 0).zero_()

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        source, target = (half[: count * dtype.itemsize].view(dtype) for half in self._bytes.chunk(2))
        out = source if in_place else target
        return on_values(source, lambda: self.comm.all_reduce(source, out))

    def close(self) -> None:
        del self._bytes
        deregister = self._nccl.lib.ncclCommWindowDeregister
        self.comm._run("window", lambda c: deregister(c, self._window))
        self._nccl.check(self._nccl.lib.ncclMemFree(self._address), "ncclMemFree")


class FlashInferAllReduce(AllReduceAlgorithm):
    """FlashInfer's kernel from vLLM over a table of pointers.

    It is one-shot for two ranks, and for more ranks up to 512 or 256 KiB.
    """

    def __init__(self, rendezvous: Rendezvous, device: torch.device, max_bytes: int) -> None:
        if device.type != "cuda":
            raise RuntimeError("needs GPUs")
        if rendezvous.size % 2:
            raise RuntimeError("its kernel takes an even number of ranks")
        self._rendezvous, self._device_index, self._max_bytes = rendezvous, device.index or 0, max_bytes
        self._memory: Any = importlib.import_module("lockstep.kernels.peer_memory")  # imports CuPy
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
            self._memory.unmap(address)
        self._rendezvous.exchange("flashinfer/unmapped")
        for address in (self._buffer_address, self._signal_address):
            self._memory.free(address)

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
        from lockstep.comm.peer_buffers import whole_granules  # imports CuPy

        address, memory = self._memory.allocate(whole_granules(nbytes), self._device_index)
        handles = self._rendezvous.exchange(f"flashinfer/{topic}", self._memory.export(address).hex())
        addresses = []
        for peer, handle in enumerate(handles):
            if peer != self._rendezvous.rank:
                self._mapped.append(self._memory.map_memory(bytes.fromhex(handle), self._device_index))
            addresses.append(address if peer == self._rendezvous.rank else self._mapped[-1])
        return addresses, memory, address


def on_values(x: Tensor, collective: Callable[[], Tensor]) -> TimedCall:
    """Return the call of a collective that reads x, into which new values are copied."""

    def call(values: Tensor | None) -> list[Tensor]:
        if values is not None:
            x.copy_(values)
        return [collective()]

    return TimedCall(call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-b", "--min-bytes", default="1K")
    parser.add_argument("-e", "--max-bytes", default="16M")
    parser.add_argument("-f", "--step-factor", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--algorithm", action="append", choices=[*ALGORITHMS, *BASELINES])
    parser.add_argument("--output-json", type=Path)
    options = parser.parse_args()
    spec = CommBenchSpec(
        sizes=list(byte_sizes(options.min_bytes, options.max_bytes, options.step_factor, options.dtype)),
        dtype=options.dtype, hidden_size=4096, algorithms=options.algorithm or ["one-shot", "nccl", *BASELINES],
        warmup=5, times=20, graph_length=64,
    )  # fmt: skip
    config = Config(tensor_parallel_size=options.tp, device=options.device)
    report = run_on_ranks(BaselineActor, config, spec, sys.stdout)
    if options.output_json is not None:
        options.output_json.write_text(report.json() + "\n")
    sys.exit(report.num_wrong > 0)


if __name__ == "__main__":
    main()
