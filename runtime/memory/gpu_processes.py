"""Processes that hold memory on a GPU: for the errors that say why something does not fit.

NVML lists every GPU of the host, regardless of CUDA_VISIBLE_DEVICES. A GPU is therefore named by its UUID.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

from ...comm.format_bytes import format_bytes

MIN_NAMED_BYTES = 100 * 2**20  # processes with less are not worth naming


@dataclass(frozen=True)
class Process:
    """A process with memory on a GPU."""

    pid: int
    used: int | None  # bytes; None if the driver does not say

    @property
    def is_large(self) -> bool:
        return self.used is None or self.used > MIN_NAMED_BYTES

    def __str__(self) -> str:
        return f"pid {self.pid} with {'an unknown amount' if self.used is None else format_bytes(self.used)}"


def processes_on(uuid: str) -> list[Process] | None:
    """Return all processes with memory on the GPU; None if NVML, or its package pynvml, cannot list them."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-').lower()}")
        return [Process(p.pid, p.usedGpuMemory) for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        return None


def describe_others(processes: Iterable[Process] | None, own_pid: int) -> str:
    """Return the end of an error message: `; also on this GPU: pid 4711 with 1.00 GiB`, or nothing."""
    by_pid = {process.pid: process for process in processes or ()}
    if not by_pid:  # this process at least must be there: a container hides them
        return "; the processes on this GPU could not be listed"
    has_host_pids = own_pid not in by_pid  # a container has its own numbers
    others = ", ".join(str(p) for p in by_pid.values() if p.pid != own_pid and p.is_large)
    if not others:
        return ""
    return f"; {'on this GPU, by the host, this process among them' if has_host_pids else 'also on this GPU'}: {others}"
