"""What torch knows of a GPU: who it is, what of its memory is in use and by whom, and that it ran out.

Apart from the plan of the memory (memory.py), which a machine without a GPU makes without torch.
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

from ..config import Config
from .gpu_processes import Process, described, processes_on
from .memory_plan import MemoryPlan, size

Phase = Literal["weights", "rehearsal", "KV cache", "graphs"]
LESS_MEMORY: dict[Phase, str] = {  # what helps where a phase of the start runs out of memory
    "weights": "use a larger tensor_parallel_size",
    "rehearsal": "lower max_num_batched_tokens, max_num_seqs or max_model_len",
    "KV cache": "lower gpu_memory_utilization",
    "graphs": "lower gpu_memory_utilization or max_num_seqs, or set enforce_eager",
}


@dataclass(frozen=True)
class Reading:
    """One look at a GPU, in bytes."""

    total: int
    used: int  # by anybody


def devices(count: int) -> list[torch.device]:
    """The first GPUs of this process."""
    return [torch.device("cuda", n) for n in range(count)]


def plan_on_gpu(plan: MemoryPlan, config: Config, device: torch.device) -> MemoryPlan:
    """The plan of a rank that has loaded nothing yet, on this GPU as it is now."""
    gc.collect()  # an earlier runner in this process
    torch.cuda.empty_cache()
    reading = read_gpu(device, config.gpus_per_rank)
    return replace(
        plan,
        place=gpu_name(device),
        total=reading.total,
        at_start=reading.used,
        utilization=config.gpu_memory_utilization,
        gpus_per_rank=config.gpus_per_rank,
        neighbours=neighbours(device),
    )


def read_gpu(device: torch.device, gpus_per_rank: float) -> Reading:
    """Where ranks share the GPU, only what this process's torch has counts: the others' memory comes and goes."""
    free, total = torch.cuda.mem_get_info(device)
    return Reading(total, total - free if gpus_per_rank == 1 else torch.cuda.memory_reserved(device))


def gpu_name(device: torch.device) -> str:
    """`GPU 3 (NVIDIA H200, 139.81 GiB)`, numbered as on the host: Ray shows a rank only its own."""
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = visible[index].strip() if index < len(visible) else ""
    properties = torch.cuda.get_device_properties(device)
    _, total = torch.cuda.mem_get_info(device)
    return f"GPU {number or index} ({properties.name}, {size(total)})"


def neighbours(device: torch.device) -> str:
    """The end of an error message: which other processes hold more than 100 MiB of this GPU."""
    return described(processes(device), os.getpid())


def processes(device: torch.device) -> list[Process] | None:
    """All processes with memory on this GPU; None where they cannot be listed."""
    return processes_on(str(torch.cuda.get_device_properties(device).uuid))


@contextmanager
def named_out_of_memory(phase: Phase, plan: MemoryPlan, device: torch.device) -> Iterator[None]:
    """Turn torch's OutOfMemoryError inside into a ValueError that names the phase of the start."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        raise ValueError(why_out_of_memory(phase, plan.place, str(error), free, neighbours(device))) from error


def why_out_of_memory(phase: Phase, place: str, error: str, free: int, others: str) -> str:
    """One line out of torch's many; `free` bytes are left."""
    needed = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
    amount = needed[1] if needed else "more memory"
    return f"{phase}: {place} ran out of memory, {amount} needed and {size(free)} free; {LESS_MEMORY[phase]}{others}"
