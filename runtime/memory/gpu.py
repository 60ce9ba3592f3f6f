"""A GPU as torch sees it: its name, memory and processes. memory_plan.py works without torch and without a GPU."""

from __future__ import annotations

import gc
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...comm.message_text import format_bytes
from ..config import Config
from .memory_plan import MemoryPlan

MIN_NAMED_BYTES = 100 * 2**20  # processes with less are not worth naming
Phase = Literal["weights", "rehearsal", "KV cache", "graphs"]
REMEDIES: dict[Phase, str] = {  # remedies if a phase of the start-up runs out of memory
    "weights": "use a larger tensor_parallel_size",
    "rehearsal": "lower max_num_batched_tokens, max_num_seqs or max_model_len",
    "KV cache": "lower gpu_memory_utilization",
    "graphs": "lower gpu_memory_utilization or max_num_seqs, or set enforce_eager",
}


@dataclass(frozen=True)
class GpuProcess:
    """A process with memory on a GPU."""

    pid: int
    used: int | None  # bytes; None if the driver does not say

    @property
    def is_large(self) -> bool:
        return self.used is None or self.used > MIN_NAMED_BYTES

    def __str__(self) -> str:
        return f"pid {self.pid} with {'an unknown amount' if self.used is None else format_bytes(self.used)}"


def devices(count: int) -> list[torch.device]:
    """Return the first `count` GPUs of this process."""
    return [torch.device("cuda", n) for n in range(count)]


def plan_on_gpu(plan: MemoryPlan, config: Config, device: torch.device) -> MemoryPlan:
    """Return the plan of a rank that has loaded nothing yet, with the state of this GPU."""
    gc.collect()  # frees an earlier runner of this process
    torch.cuda.empty_cache()
    used, total = read_gpu(device, config.gpus_per_rank)
    return replace(
        plan,
        place=gpu_name(device),
        total=total,
        at_start=used,
        utilization=config.gpu_memory_utilization,
        gpus_per_rank=config.gpus_per_rank,
        other_processes=other_processes(device),
    )


def read_gpu(device: torch.device, gpus_per_rank: float) -> tuple[int, int]:
    """Return the bytes in use and all bytes of a GPU; if ranks share it, only those in use by this process's torch."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free if gpus_per_rank == 1 else torch.cuda.memory_reserved(device), total


def gpu_name(device: torch.device) -> str:
    """Return `GPU 3 (NVIDIA H200, 139.81 GiB)`, numbered as on the host: Ray shows a rank only its own."""
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[index].strip() if index < len(visible) else ""
    properties = torch.cuda.get_device_properties(device)
    _, total = torch.cuda.mem_get_info(device)
    return f"GPU {number or index} ({properties.name}, {format_bytes(total)})"


def processes(device: torch.device) -> list[GpuProcess] | None:
    """Return all processes with memory on this GPU; None if they cannot be listed."""
    return processes_on(str(torch.cuda.get_device_properties(device).uuid))


def processes_on(uuid: str) -> list[GpuProcess] | None:
    """Return all processes with memory on a GPU; None if NVML, or its package pynvml, cannot list them."""
    # Find the GPU by UUID: NVML lists every GPU of the host, regardless of CUDA_VISIBLE_DEVICES.
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-').lower()}")
        return [GpuProcess(p.pid, p.usedGpuMemory) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        return None


def other_processes(device: torch.device) -> str:
    """Return the end of an error message: the other processes that hold more than 100 MiB of this GPU."""
    return describe_others(processes(device), os.getpid())


def describe_others(processes: Iterable[GpuProcess] | None, own_pid: int) -> str:
    """Return the end of an error message: `; also on this GPU: pid 4711 with 1.00 GiB`, or nothing."""
    by_pid = {process.pid: process for process in processes or ()}
    if not by_pid:  # a container hides the processes: at least this one must be listed
        return "; the processes on this GPU could not be listed"
    has_host_pids = own_pid not in by_pid  # a container has its own numbers
    others = ", ".join(str(p) for p in by_pid.values() if p.pid != own_pid and p.is_large)
    if not others:
        return ""
    return f"; {'on this GPU, by the host, this process among them' if has_host_pids else 'also on this GPU'}: {others}"


@contextmanager
def named_out_of_memory(phase: Phase, plan: MemoryPlan, device: torch.device) -> Iterator[None]:
    """Turn torch's OutOfMemoryError inside into a ValueError that names the phase of the start-up."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        needed = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))  # one line from torch's many
        raise ValueError(
            f"{phase}: {plan.place} ran out of memory, {needed[1] if needed else 'more memory'} needed and"
            f" {format_bytes(free)} free; {REMEDIES[phase]}{other_processes(device)}"
        ) from error
