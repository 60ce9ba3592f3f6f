"""Checks of one machine: packages, network interface, shared memory and limits.

The `_finding` functions take numbers and text, so that tests can stand for any machine.
"""

from __future__ import annotations

import platform
import resource
import runpy
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from ...comm.format_bytes import format_bytes
from ..cluster.network import is_own, own_addresses
from ..cluster.rank_resources import LOCAL_OBJECT_STORE_BYTES
from .finding import Finding, fail, ok, warn
from .planned_start import PlannedStart

DRIVER = Path("/proc/driver/nvidia/version")
NCCL_SHM_BYTES = 64 * 2**20  # of each rank, an estimate: a buffer of 4 MiB for each of NCCL's channels
MIN_FILES, ENOUGH_FILES = 512, 4096  # descriptors of Ray and torch, beside one for each request's connection
LISTED_PACKAGES = ("torch", "ray", "transformers", "cupy", "flashinfer", "cuda-python")


def check_packages(start: PlannedStart) -> Finding:
    """Compare the installed packages with lockstep's requirements."""
    if _version("lockstep") is None:
        return warn(
            "lockstep can be imported but is not installed; what it requires is unknown", "run scripts/setup.sh"
        )
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
        f"{line.name}{line.specifier} ({'not there' if (version := installed.get(line.name)) is None else version})"
        for line in required
        if not line.specifier.contains(installed.get(line.name, "0"), prereleases=True) or line.name not in installed
    ]
    if wrong:
        target = f"lockstep[{extra}]" if extra else "lockstep"
        return fail(f"needs {', '.join(wrong)}", f"run scripts/setup.sh, or pip install '{target}'")
    listed = [f"{name} {version}" for name, version in installed.items() if name.startswith(LISTED_PACKAGES)]
    text = f"Python {platform.python_version()}, {', '.join(listed)}, CUDA {cuda or 'not in this torch'}"
    if driver and not cuda:
        return warn(f"{text}, but this machine has an NVIDIA driver", "scripts/setup.sh installs a CUDA build")
    return ok(text)


def versions(start: PlannedStart) -> dict[str, str]:
    """Return the versions that must be equal on all nodes, by name; NCCL only on a machine with GPUs."""
    library = {}
    if start.gpus:
        from ...comm.nccl_library import open_library  # imports torch

        library = {"NCCL": str(open_library(start.config.nccl_library))}
    packages = {name: _version(name) or "none" for name in ("lockstep", "torch", "ray", "transformers")}
    return {"Python": platform.python_version(), **packages, **library}


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


def check_shared_memory(start: PlannedStart) -> Finding:
    """Check that /dev/shm has room for Ray's object store and NCCL."""
    ray = LOCAL_OBJECT_STORE_BYTES if start.starts_ray else 0
    nccl = NCCL_SHM_BYTES * start.config.tensor_parallel_size if start.gpus > 1 else 0
    return shared_memory_finding(shutil.disk_usage("/dev/shm").free, ray, nccl)


def shared_memory_finding(free: int, ray: int, nccl: int) -> Finding:
    """Return the finding for free bytes, and the bytes that a Ray cluster started here and NCCL take."""
    text = (
        f"{format_bytes(free)} free in /dev/shm, {format_bytes(ray)} for Ray and {format_bytes(nccl)} for NCCL needed"
    )
    remedy = "free some, or give the container more (docker run --shm-size=2g)"
    if free < nccl:
        return fail(text, remedy)
    # Ray then puts its store into /tmp. Lockstep's store stays empty, so this is only a warning.
    return warn(text, remedy) if free < nccl + ray else ok(text)


def check_open_files(start: PlannedStart) -> Finding:
    """Check the limit of open files against the number of requests."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return open_files_finding(soft, hard, start.config.max_num_seqs)


def open_files_finding(soft: int, hard: int, requests: int) -> Finding:
    """Return the finding for the soft and the hard limit of descriptors."""
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES + requests:
        return ok(f"{'no limit' if soft == resource.RLIM_INFINITY else f'limit of {soft}'}")
    remedy = f"ulimit -n {ENOUGH_FILES + requests}" + (f" (as root: the hard limit is {hard})" if hard == soft else "")
    text = f"limit of {soft}, and {requests} requests at once need {MIN_FILES + requests} and better more"
    return fail(text, remedy) if soft < MIN_FILES + requests else warn(text, remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
