"""Checks of one machine: packages, GPUs, NCCL, network interface, /dev/shm and limits.

The `_finding` functions take numbers and text, so that tests can stand for any machine and need no GPU.
"""

from __future__ import annotations

import os
import platform
import resource
import runpy
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from ...comm.message_text import counted, format_bytes
from ...runtime.config import Config
from ..cluster.network import is_own, own_addresses
from ..cluster.rank_resources import LOCAL_OBJECT_STORE_BYTES, bundle, fitting
from ..cluster.session_folder import SessionFolder
from ..open_files import MIN_FILES, remedy
from .finding import Finding, fail, ok, warn
from .p2p import PairResults
from .planned_start import PlannedStart, visible_gpus

if TYPE_CHECKING:  # imports torch
    from ...runtime.memory.gpu import GpuProcess

DRIVER = Path("/proc/driver/nvidia/version")
NCCL_SHM_BYTES = 64 * 2**20  # an estimate for one rank: each of NCCL's channels has a buffer of 4 MiB
ENOUGH_FILES = 4096  # beside those of MIN_FILES and one for each request: files of the checkpoint, clients that wait
LISTED_PACKAGES = ("torch", "ray", "transformers", "cupy", "flashinfer", "cuda-python")
NO_GPU = "skipped: no GPU here that the ranks would use"


def check_packages(start: PlannedStart) -> Finding:
    """Compare the installed packages with lockstep's requirements."""
    if _version("lockstep") is None:
        text = "lockstep can be imported but is not installed; what it requires is unknown"
        return warn(text, "run scripts/setup.sh")
    cuda = cuda_of_torch()
    extra = f"cuda{cuda.split('.')[0]}" if cuda and start.gpus else ""
    lines = [Requirement(line) for line in metadata.requires("lockstep") or ()]
    required = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    installed = {line.name: version for line in required if (version := _version(line.name))}
    return packages_finding(required, installed, cuda, driver=DRIVER.exists(), extra=extra)


def cuda_of_torch() -> str | None:
    """Return `torch.version.cuda` without importing torch; None also without torch."""
    package = find_spec("torch")
    if package is None or package.origin is None:
        return None
    cuda: str | None = runpy.run_path(str(Path(package.origin).with_name("version.py")))["cuda"]
    return cuda


def packages_finding(
    required: Sequence[Requirement], installed: Mapping[str, str], cuda: str | None, *, driver: bool, extra: str
) -> Finding:
    """Return the finding for installed versions by name; `driver`: the machine has an NVIDIA driver."""
    wrong = [
        f"{line.name}{line.specifier} ({installed.get(line.name, 'not there')})"
        for line in required
        if line.name not in installed or not line.specifier.contains(installed[line.name], prereleases=True)
    ]
    if wrong:
        target = f"lockstep[{extra}]" if extra else "lockstep"
        return fail(f"needs {', '.join(wrong)}", f"run scripts/setup.sh, or pip install '{target}'")
    listed = [f"{name} {version}" for name, version in installed.items() if name.startswith(LISTED_PACKAGES)]
    cuda_text = f"CUDA {cuda}" if cuda else "torch without CUDA"
    text = f"Python {platform.python_version()}, {', '.join(listed)}, {cuda_text}"
    if driver and not cuda:
        return warn(f"{text}, but this machine has an NVIDIA driver", "scripts/setup.sh installs a CUDA build")
    return ok(text)


def versions(start: PlannedStart) -> dict[str, str]:
    """Return the versions that must be equal on all nodes, by name; NCCL only on a machine with GPUs."""
    by_name = {name: _version(name) or "none" for name in ("lockstep", "torch", "ray", "transformers")}
    if start.gpus:
        from ...comm.nccl_library import open_library  # imports torch

        by_name["NCCL"] = str(open_library(start.config.nccl_library))
    return {"Python": platform.python_version(), **by_name}


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
    named_by_user = start.config.nccl_library is not None
    return nccl_finding(str(library), library.path, mapped_libraries(), named_by_user=named_by_user)


def nccl_finding(version: str, path: str, mapped: Sequence[str], *, named_by_user: bool) -> Finding:
    """Return the finding for the mapped libraries; beside a library that the user names, torch's is mapped too."""
    text = f"{version} from {path}"
    if len(mapped) > (2 if named_by_user else 1):
        return warn(f"{text}, and {len(mapped)} are mapped: {', '.join(mapped)}", "uninstall all but one nvidia-nccl")
    return ok(text + (", beside torch's own" if len(mapped) > 1 else ""))


def check_p2p(start: PlannedStart) -> Finding:
    """Check the copies between the GPUs of this machine."""
    if start.gpus < 2 or start.p2p is None:
        return ok(f"skipped: the ranks would use {counted(start.gpus, 'GPU')} here, and a copy needs two")
    return p2p_finding(start.p2p.result())


def p2p_finding(results: PairResults) -> Finding:
    """Return the finding for the copies between each pair of GPUs."""
    wrong, staged = ([pair for pair, result in results.items() if result == kind] for kind in ("wrong", "staged"))
    if wrong:
        remedy = "set NCCL_P2P_DISABLE=1, and look at the IOMMU's settings (ACS)"
        return fail(f"what one GPU writes arrives changed at another, GPU {', '.join(wrong)}", remedy)
    if staged:
        return warn(f"no direct access, slow, GPU {', '.join(staged)}", "use GPUs that NVLink or one PCIe root joins")
    return ok(f"{len(results)} directions written, read back, and direct")


def check_gpu_processes(start: PlannedStart) -> Finding:
    """Check which other processes use the GPUs of the ranks."""
    if start.gpus == 0:
        return ok(NO_GPU)
    from ...runtime.memory import gpu  # imports torch

    return gpu_processes_finding([gpu.processes(device) for device in gpu.devices(start.gpus)], os.getpid())


def gpu_processes_finding(gpus: Sequence[Sequence[GpuProcess] | None], own_pid: int) -> Finding:
    """Return the finding for the processes on each GPU, None if they cannot be listed."""
    if all(processes is None for processes in gpus):
        remedy = "install nvidia-ml-py, and see that nvidia-smi runs here"
        return warn("NVML does not list the processes on the GPUs", remedy)
    others = [
        f"GPU {n}: {process}"
        for n, processes in enumerate(gpus)
        for process in processes or ()
        if process.pid != own_pid and process.is_large
    ]
    if others:
        return warn(", ".join(others), "end them, or lower gpu_memory_utilization to what they leave")
    return ok(f"no other process on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")


def check_interface(start: PlannedStart) -> Finding:
    """Check that the address of this machine belongs to a network interface."""
    return interface_finding(start.ip, is_own(start.ip), own_addresses())


def interface_finding(ip: str, can_bind: bool, addresses: Mapping[str, str]) -> Finding:
    """Return the finding for an address; `addresses` has the first IPv4 address of each network interface."""
    if not can_bind:
        listed = ", ".join(f"{name} {address}" for name, address in addresses.items())
        return fail(f"{ip} is no address of this machine ({listed})", "ray start --node-ip-address=ONE_OF_THESE")
    name = next((name for name, address in addresses.items() if address == ip), "an interface's second address")
    return ok(f"{name}, {ip}")


def check_dev_shm(start: PlannedStart) -> Finding:
    """Check that /dev/shm has room for Ray's object store and NCCL."""
    ray = LOCAL_OBJECT_STORE_BYTES if start.starts_ray else 0
    nccl = NCCL_SHM_BYTES * start.config.tensor_parallel_size if start.gpus > 1 else 0
    return dev_shm_finding(shutil.disk_usage("/dev/shm").free, ray, nccl)


def dev_shm_finding(free: int, ray: int, nccl: int) -> Finding:
    """Return the finding for free bytes, and the bytes that a Ray cluster started here and NCCL take."""
    needed = f"{format_bytes(ray)} for Ray and {format_bytes(nccl)} for NCCL needed"
    text = f"{format_bytes(free)} free in /dev/shm, {needed}"
    remedy = "free some, or give the container more (docker run --shm-size=2g)"
    if free < nccl:
        return fail(text, remedy)
    # Ray then puts its store into /tmp. Lockstep's store stays empty, so this is only a warning.
    return warn(text, remedy) if free < nccl + ray else ok(text)


def check_ray_folder(start: PlannedStart) -> Finding:
    """Check that a Ray cluster started here has a folder for its sockets and logs; a bad default is a log line."""
    if not start.starts_ray:
        return ok("skipped: this start needs no local Ray")
    folder = SessionFolder()
    folder.close()
    return ok(str(folder.path.parent))


def check_open_files(start: PlannedStart) -> Finding:
    """Check the limit of open files against the number of requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The ranks of a cluster that runs already inherit the limit of its raylet, which is that of this process.
    return open_files_finding(soft, hard if start.alone else soft, start.config.max_num_seqs)


def open_files_finding(soft: int, highest: int, requests: int) -> Finding:
    """Return the finding for the limit of open files, which a start raises from `soft` to `highest`.

    requests  this many may be open at once
    """
    text = f"limit of {highest}" + (f", to which a start raises {soft}" if soft != highest else "")
    enough, least = ENOUGH_FILES + requests, MIN_FILES + requests
    if highest == resource.RLIM_INFINITY:
        return ok("no limit")
    if highest >= enough:
        return ok(text)
    text = f"{text}, and {requests} requests at once need {least} and better more"
    return (fail if highest < least else warn)(text, remedy(enough))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
