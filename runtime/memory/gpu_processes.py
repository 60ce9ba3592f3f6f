"""Who else holds memory on this process's GPU: for the errors that say why something does not fit.

NVML is asked through `pynvml` where that is installed (FlashInfer brings it), otherwise through nvidia-smi. Both know
every GPU of the host, whatever CUDA_VISIBLE_DEVICES hides: ours is found by its UUID.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

QUERY = ("nvidia-smi", "--query-compute-apps=pid,used_memory,gpu_uuid", "--format=csv,noheader,nounits")
DEADLINE_S = 3.0
WORTH_NAMING = 100 * 2**20


@dataclass(frozen=True)
class Process:
    """A process with memory on a GPU."""

    pid: int
    used: int | None  # bytes; None where the driver does not say


def processes_on(uuid: str) -> list[Process] | None:
    """All processes with memory on the GPU; None if neither NVML nor nvidia-smi can tell."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return ask_nvidia_smi(uuid)
    try:
        nvml.nvmlInit()
        found = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(f"GPU-{_bare(uuid)}"))
    except nvml.NVMLError:
        return None
    return [Process(each.pid, each.usedGpuMemory) for each in found]


def ask_nvidia_smi(uuid: str) -> list[Process] | None:
    """Like `processes_on`, from the driver's own tool; None if it is missing, fails or takes too long."""
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        return parse(answer.stdout, uuid)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def parse(csv: str, uuid: str) -> list[Process]:
    """The rows `pid, MiB, GPU-uuid` of this GPU; ValueError for text that is no such table."""
    rows = [[field.strip() for field in line.split(",")] for line in csv.splitlines() if line.strip()]
    return [
        Process(int(pid), int(used) * 2**20 if used.isdigit() else None)  # "[N/A]" in some containers
        for pid, used, where in rows
        if _bare(where) == _bare(uuid)
    ]


def described(found: Iterable[Process] | None, own_pid: int) -> str:
    """`; also on this GPU: pid 4711 with 1.00 GiB`, or nothing where this process is alone."""
    processes = {process.pid: process for process in found or ()}
    if not processes:  # this process at least must be there: a container hides them
        return "; the processes on this GPU could not be listed"
    foreign = own_pid not in processes
    processes.pop(own_pid, None)
    named = [p for p in processes.values() if p.used is None or p.used > WORTH_NAMING]
    if not named:
        return ""
    listed = ", ".join(f"pid {p.pid} with {_amount(p.used)}" for p in named)
    return f"; {'on this GPU, by the host, this process among them' if foreign else 'also on this GPU'}: {listed}"


def _amount(used: int | None) -> str:
    return "an unknown amount" if used is None else f"{used / 2**30:.2f} GiB"


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").lower()
