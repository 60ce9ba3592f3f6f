"""A GPU as torch sees it: its name, its memory in use, and the error when it runs out.

Separate from memory_plan.py, which works without torch on a machine without a GPU.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...comm.format_bytes import format_bytes
from ..config import Config
from .gpu_processes import Process, describe_others, processes_on
from .memory_plan import MemoryPlan

Phase = Literal["weights", "rehearsal", "KV cache", "graphs"]
REMEDIES: dict[Phase, str] = {  # against running out of memory in a phase of the start-up
    "weights": "use a larger tensor_parallel_size",
    "rehearsal": "lower max_num_batched_tokens, max_num_seqs or max_model_len",
    "KV cache": "lower gpu_memory_utilization",
    "graphs": "lower gpu_memory_utilization or max_num_seqs, or set enforce_eager",
}


@dataclass(frozen=True)
class GpuMemory:
    """One reading of a GPU's memory, in bytes."""

    total: int
    used: int  # by all processes


def devices(count: int) -> list[torch.device]:
    """Return the first `count` GPUs of this process."""
    return [torch.device("cuda", n) for n in range(count)]


def plan_on_gpu(plan: MemoryPlan, config: Config, device: torch.device) -> MemoryPlan:
    """Return the plan of a rank that has loaded nothing yet, with the state of this GPU."""
    gc.collect()  # an earlier runner in this process
    torch.cuda.empty_cache()
    memory = read_gpu(device, config.gpus_per_rank)
    return replace(
        plan,
        place=gpu_name(device),
        total=memory.total,
        at_start=memory.used,
        utilization=config.gpu_memory_utilization,
        gpus_per_rank=config.gpus_per_rank,
        other_processes=other_processes(device),
    )


def read_gpu(device: torch.device, gpus_per_rank: float) -> GpuMemory:
    """Read the memory of a GPU. If ranks share it, only this process's torch counts: the others' use varies."""
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(total, total - free if gpus_per_rank == 1 else torch.cuda.memory_reserved(device))


def gpu_name(device: torch.device) -> str:
    """Return `GPU 3 (NVIDIA H200, 139.81 GiB)`, numbered as on the host: Ray shows a rank only its own."""
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[index].strip() if index < len(visible) else ""
    properties = torch.cuda.get_device_properties(device)
    _, total = torch.cuda.mem_get_info(device)
    return f"GPU {number or index} ({properties.name}, {format_bytes(total)})"


def other_processes(device: torch.device) -> str:
    """Return the end of an error message: the other processes that hold more than 100 MiB of this GPU."""
    return describe_others(processes(device), os.getpid())


def processes(device: torch.device) -> list[Process] | None:
    """Return all processes with memory on this GPU; None if they cannot be listed."""
    return processes_on(str(torch.cuda.get_device_properties(device).uuid))


@contextmanager
def named_out_of_memory(phase: Phase, plan: MemoryPlan, device: torch.device) -> Iterator[None]:
    """Turn torch's OutOfMemoryError inside into a ValueError that names the phase of the start-up."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        raise ValueError(out_of_memory_message(phase, plan.place, str(error), free, other_processes(device))) from error


def out_of_memory_message(phase: Phase, place: str, error: str, free: int, others: str) -> str:
    """Return one line from torch's many; `free` bytes are left, `others` is the result of `other_processes`."""
    needed = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
    amount = needed[1] if needed else "more memory"
    return (
        f"{phase}: {place} ran out of memory, {amount} needed and {format_bytes(free)} free; {REMEDIES[phase]}{others}"
    )
