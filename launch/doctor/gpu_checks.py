"""Checks of GPUs: enough of them for the ranks, NCCL, peer-to-peer access and other processes.

The `_finding` functions take numbers and text, so that tests need no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ...runtime.config import Config
from ...runtime.memory.gpu_processes import Process
from ..cluster.rank_resources import bundle, fitting
from .finding import Finding, fail, ok, warn
from .p2p import PairResults
from .planned_start import PlannedStart, visible_gpus

NO_GPU = "skipped: no GPU here that the ranks would use"


def check_devices(start: PlannedStart) -> Finding:
    """Check that the ranks fit on this machine, which is not part of a cluster."""
    cores, ranks = len(os.sched_getaffinity(0)), start.config.tensor_parallel_size
    # A Ray cluster that lockstep starts has a CPU for each rank.
    resources = {"CPU": max(cores, ranks), "GPU": visible_gpus()}
    finding = devices_finding(start.config, {"this machine": resources})
    if finding.status == "ok" and start.gpus == 0 and cores < ranks:
        return warn(f"{ranks} ranks share {cores} cores", "use a smaller --tp, or GPUs")
    return finding


def devices_finding(config: Config, nodes: Mapping[str, Mapping[str, float]]) -> Finding:
    """Return the finding for the CPUs and GPUs of each node, as in Ray's table of resources."""
    ranks, cuda = config.tensor_parallel_size, uses_gpus(config, nodes)
    room = sum(fitting(amounts, bundle(config, cuda=cuda)) for amounts in nodes.values())
    listed = ", ".join(f"{node} has {a.get('CPU', 0):g} CPUs and {a.get('GPU', 0):g} GPUs" for node, a in nodes.items())
    devices = f"with {config.gpus_per_rank:g} GPU each" if cuda else "on CPUs"
    text = f"{ranks} rank{'s' if ranks > 1 else ''} {devices}"
    if room < ranks:
        return fail(f"{text} do not fit: {listed}, room for {room}", "use a smaller --tp, more nodes, or --device cpu")
    return ok(f"{text}: {listed}")


def uses_gpus(config: Config, nodes: Mapping[str, Mapping[str, float]]) -> bool:
    """Return True if the ranks take GPUs on nodes with these resources."""
    has_gpus = any(amounts.get("GPU", 0) > 0 for amounts in nodes.values())
    return config.device == "cuda" or (config.device == "auto" and has_gpus)


def check_nccl(start: PlannedStart) -> Finding:
    """Check that libnccl can be loaded, and that only one is."""
    if start.gpus == 0:
        return ok(NO_GPU)
    from ...comm.nccl_library import NcclError, mapped_libraries, open_library  # imports torch, and its libnccl

    try:
        library = open_library(start.config.nccl_library)
    except NcclError as error:
        raise ValueError(str(error)) from error
    named = start.config.nccl_library is not None
    return nccl_finding(str(library), library.path, mapped_libraries(), named_by_user=named)


def nccl_finding(version: str, path: str, mapped: Sequence[str], *, named_by_user: bool) -> Finding:
    """Return the finding for the mapped libraries; beside a library that the user names, torch's is mapped too."""
    text = f"{version} from {path}"
    if len(mapped) > (2 if named_by_user else 1):
        return warn(f"{text}, and {len(mapped)} are mapped: {', '.join(mapped)}", "uninstall all but one nvidia-nccl")
    return ok(text + (", beside torch's own" if len(mapped) > 1 else ""))


def check_p2p(start: PlannedStart) -> Finding:
    """Check the copies between the GPUs of this machine."""
    if start.gpus < 2 or start.p2p is None:
        return ok(f"skipped: {start.gpus} GPUs here that the ranks would use, and it takes two")
    return p2p_finding(start.p2p.result())


def p2p_finding(results: PairResults) -> Finding:
    """Return the finding for the result of each pair of GPUs."""
    wrong, staged = ([pair for pair, result in results.items() if result == kind] for kind in ("wrong", "staged"))
    if wrong:
        return fail(
            f"what one GPU writes arrives changed at another, GPU {', '.join(wrong)}",
            "set NCCL_P2P_DISABLE=1, and look at the IOMMU's settings (ACS)",
        )
    if staged:
        return warn(f"no direct access, slow, GPU {', '.join(staged)}", "use GPUs that NVLink or one PCIe root joins")
    return ok(f"{len(results)} directions written, read back, and direct")


def check_gpu_processes(start: PlannedStart) -> Finding:
    """Check which other processes use the GPUs of the ranks."""
    if start.gpus == 0:
        return ok(NO_GPU)
    from ...runtime.memory import gpu  # imports torch

    return gpu_processes_finding([gpu.processes(device) for device in gpu.devices(start.gpus)], os.getpid())


def gpu_processes_finding(gpus: Sequence[Sequence[Process] | None], own_pid: int) -> Finding:
    """Return the finding for the processes on each GPU, None if they cannot be listed."""
    if all(processes is None for processes in gpus):
        return warn(
            "NVML does not list the processes on the GPUs", "install nvidia-ml-py, and see that nvidia-smi runs here"
        )
    others = [
        f"GPU {n}: {process}"
        for n, processes in enumerate(gpus)
        for process in processes or ()
        if process.pid != own_pid and process.is_large
    ]
    if others:
        return warn(", ".join(others), "end them, or lower gpu_memory_utilization to what they leave")
    return ok(f"no other process on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")
