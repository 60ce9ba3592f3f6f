"""What the doctor looks at on one machine: each check is a small function from a Case to a Finding.

The `judge_` functions are given numbers and words, so that they need no GPU and no full disk to be tested. Errors of
the runtime are findings as they are: `values, rule; way out`. Importing torch takes longer than all the rest, so only
what looks at a GPU does so.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import runpy
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import tokenizers
from packaging.requirements import Requirement

from ...runtime.checkpoint import NotFetched, checkpoint_folder
from ...runtime.config import Config
from ...runtime.memory.gpu_processes import WORTH_NAMING, Process
from ...runtime.memory.memory_plan import MemoryPlan, check_kv_cache, check_weights, plan_weights, size
from ...runtime.model.model_config import ModelConfig
from ...runtime.model.safetensors_files import check_files
from ...runtime.tokenizer import Tokenizer
from ..cluster.network import is_own, own_addresses
from ..cluster.resources import LOCAL_OBJECT_STORE_BYTES, bundle, fitting
from ..errors import PlacementError, RankFailed
from .p2p import P2PCheck, Ways

Status = Literal["ok", "warn", "fail"]
NO_GPU = "skipped: no GPU here that the ranks would use"
DRIVER = Path("/proc/driver/nvidia/version")
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")  # torch counts GPUs through one of these
NCCL_SHM_BYTES = 64 * 2**20  # of each rank, an estimate: NCCL's buffers of 4 MiB, one for each of its channels
MIN_FILES, ENOUGH_FILES = 512, 4096  # descriptors: Ray's and torch's own, beside one for each request's connection
NAMED = ("torch", "ray", "transformers", "cupy", "flashinfer", "cuda-python")  # of the packages, those worth a line


@dataclass(frozen=True)
class Finding:
    """What one check has found; `remedy` is the way out where something is wrong."""

    name: str
    status: Status
    finding: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name}: {self.finding}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Case:
    """What is to be started, and this machine's part in it."""

    config: Config
    ip: str  # by which the other ranks would reach this machine
    starts_ray: bool = False  # a start would bring up a cluster of its own here
    peers: P2PCheck | None = None

    @property
    def gpus(self) -> int:
        """How many of this machine's GPUs the ranks may use."""
        return 0 if self.config.device == "cpu" else min(visible_gpus(), gpus_needed(self.config))

    @property
    def folder(self) -> Path:
        return checkpoint_folder(self.config.model, self.config.revision, fetch=False)

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_folder(self.folder)


def run(name: str, check: Callable[[], Finding]) -> Finding:
    """The check's finding under its name; what it raises is a failure."""
    try:
        return replace(check(), name=name)
    except NotFetched as error:
        finding, _, remedy = str(error).partition("; ")
        return Finding(name, "warn", finding, f"{remedy}, or wait while it is fetched at the start")
    except (ValueError, PlacementError, RankFailed) as error:
        finding, _, remedy = _first_line(error).partition("; ")
        return Finding(name, "fail", finding, remedy)
    except Exception as error:  # noqa: BLE001 - the others must still run, and this one's crash is a finding as well
        return Finding(name, "fail", f"the check crashed: {type(error).__name__}: {_first_line(error)}", "report it")


def visible_gpus() -> int:
    """How many GPUs torch sees."""
    if not has_driver():
        return 0
    import torch  # seconds

    return torch.cuda.device_count()


def has_driver() -> bool:
    """Whether one of DRIVER_LIBRARIES can be loaded; without any, torch sees no GPU."""
    for library in DRIVER_LIBRARIES:
        with suppress(OSError):
            CDLL(library)
            return True
    return False


def gpus_needed(config: Config) -> int:
    """If the ranks run on GPUs."""
    return math.ceil(config.tensor_parallel_size / max(1, int(1 / config.gpus_per_rank + 1e-6)))


def on_gpus(config: Config, nodes: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the ranks take GPUs, by each node's resources."""
    has_gpus = any(amounts.get("GPU", 0) > 0 for amounts in nodes.values())
    return config.device == "cuda" or (config.device == "auto" and has_gpus)


# -- the machine


def packages(case: Case) -> Finding:
    if _version("lockstep") is None:
        return _warn(
            "lockstep can be imported but is not installed; what it requires is unknown", "run scripts/setup.sh"
        )
    cuda = cuda_of_torch()
    extra = f"cuda{cuda.split('.')[0]}" if cuda and case.gpus else ""
    lines = [Requirement(line) for line in metadata.requires("lockstep") or ()]
    wanted = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    installed = {line.name: version for line in wanted if (version := _version(line.name))}
    return judge_packages(wanted, installed, cuda, driver=DRIVER.exists(), extra=extra)


def cuda_of_torch() -> str | None:
    """`torch.version.cuda`, out of the file that sets it; None also where there is no torch."""
    package = find_spec("torch")
    if package is None or package.origin is None:
        return None
    cuda: str | None = runpy.run_path(str(Path(package.origin).with_name("version.py")))["cuda"]
    return cuda


def judge_packages(
    wanted: Sequence[Requirement], installed: Mapping[str, str], cuda: str | None, *, driver: bool, extra: str
) -> Finding:
    wrong = [
        f"{line.name}{line.specifier} ({'not there' if (version := installed.get(line.name)) is None else version})"
        for line in wanted
        if not line.specifier.contains(installed.get(line.name, "0"), prereleases=True) or line.name not in installed
    ]
    if wrong:
        target = f"lockstep[{extra}]" if extra else "lockstep"
        return _fail(f"needs {', '.join(wrong)}", f"run scripts/setup.sh, or pip install '{target}'")
    named = [f"{name} {version}" for name, version in installed.items() if name.startswith(NAMED)]
    found = f"Python {platform.python_version()}, {', '.join(named)}, CUDA {cuda or 'not in this torch'}"
    if driver and not cuda:
        return _warn(f"{found}, but this machine has an NVIDIA driver", "scripts/setup.sh installs a CUDA build")
    return _ok(found)


def devices(case: Case) -> Finding:
    """Without a cluster; `judge_devices` of its nodes with one."""
    cores = len(os.sched_getaffinity(0))
    # A Ray of our own is told of a CPU for each rank.
    here = {"CPU": max(cores, case.config.tensor_parallel_size), "GPU": visible_gpus()}
    finding = judge_devices(case.config, {"this machine": here})
    if finding.status == "ok" and case.gpus == 0 and cores < case.config.tensor_parallel_size:
        return _warn(f"{case.config.tensor_parallel_size} ranks share {cores} cores", "use a smaller --tp, or GPUs")
    return finding


def judge_devices(config: Config, nodes: Mapping[str, Mapping[str, float]]) -> Finding:
    """Whether the ranks ever fit, by each node's CPUs and GPUs in Ray's table of resources."""
    ranks, cuda = config.tensor_parallel_size, on_gpus(config, nodes)
    room = sum(fitting(amounts, bundle(config, cuda=cuda)) for amounts in nodes.values())
    there = ", ".join(f"{node} has {a.get('CPU', 0):g} CPUs and {a.get('GPU', 0):g} GPUs" for node, a in nodes.items())
    each = f"with {config.gpus_per_rank:g} GPU each" if cuda else "on CPUs"
    asked = f"{ranks} rank{'s' if ranks > 1 else ''} {each}"
    if room < ranks:
        return _fail(f"{asked} do not fit: {there}, room for {room}", "use a smaller --tp, more nodes, or --device cpu")
    return _ok(f"{asked}: {there}")


def nccl(case: Case) -> Finding:
    if case.gpus == 0:
        return _ok(NO_GPU)
    from ...comm.nccl_library import (
        NcclError,
        mapped_libraries,
        open_library,
    )  # imports torch, which brings the library

    try:
        library = open_library(case.config.nccl_library)
    except NcclError as error:
        raise ValueError(str(error)) from error
    return judge_nccl(str(library), library.path, mapped_libraries(), chosen=case.config.nccl_library is not None)


def judge_nccl(version: str, path: str, mapped: Sequence[str], *, chosen: bool) -> Finding:
    """`chosen`: the user names the library, and torch's own is then mapped beside it."""
    found = f"{version} from {path}"
    if len(mapped) > (2 if chosen else 1):
        return _warn(f"{found}, and {len(mapped)} are mapped: {', '.join(mapped)}", "uninstall all but one nvidia-nccl")
    return _ok(found + (", beside torch's own" if len(mapped) > 1 else ""))


def interface(case: Case) -> Finding:
    return judge_interface(case.ip, is_own(case.ip), own_addresses())


def judge_interface(ip: str, own: bool, addresses: Mapping[str, str]) -> Finding:
    """`own`: a socket can be bound to `ip`; `addresses`: the first IPv4 address of each network interface."""
    if not own:
        known = ", ".join(f"{name} {address}" for name, address in addresses.items())
        return _fail(f"{ip} is no address of this machine ({known})", "ray start --node-ip-address=ONE_OF_THESE")
    name = next((name for name, address in addresses.items() if address == ip), "an interface's second address")
    return _ok(f"{name}, {ip}")


def peers(case: Case) -> Finding:
    if case.gpus < 2 or case.peers is None:
        return _ok(f"skipped: {case.gpus} GPUs here that the ranks would use, and it takes two")
    return judge_peers(case.peers.result())


def judge_peers(ways: Ways) -> Finding:
    wrong, staged = ([pair for pair, way in ways.items() if way == kind] for kind in ("wrong", "staged"))
    if wrong:
        return _fail(
            f"what one GPU writes arrives changed at another, GPU {', '.join(wrong)}",
            "set NCCL_P2P_DISABLE=1, and look at the IOMMU's settings (ACS)",
        )
    if staged:
        return _warn(f"no direct access, slow, GPU {', '.join(staged)}", "use GPUs that NVLink or one PCIe root joins")
    return _ok(f"{len(ways)} directions written, read back, and direct")


def shared_memory(case: Case) -> Finding:
    ray = LOCAL_OBJECT_STORE_BYTES if case.starts_ray else 0
    ranks = case.config.tensor_parallel_size
    return judge_shared_memory(shutil.disk_usage("/dev/shm").free, ray, NCCL_SHM_BYTES * ranks if case.gpus > 1 else 0)


def judge_shared_memory(free: int, ray: int, nccl: int) -> Finding:
    """Bytes free, and those that a Ray of our own and NCCL would take."""
    found = f"{size(free)} free in /dev/shm, {size(ray)} for Ray and {size(nccl)} for NCCL needed"
    remedy = "free some, or give the container more (docker run --shm-size=2g)"
    if free < nccl:
        return _fail(found, remedy)
    # Ray then puts its store into /tmp, where ours stays empty.
    return _warn(found, remedy) if free < nccl + ray else _ok(found)


def neighbours(case: Case) -> Finding:
    if case.gpus == 0:
        return _ok(NO_GPU)
    from ...runtime.memory import gpu  # imports torch

    return judge_neighbours([gpu.processes(device) for device in gpu.devices(case.gpus)], os.getpid())


def judge_neighbours(gpus: Sequence[Sequence[Process] | None], own_pid: int) -> Finding:
    """The processes on each GPU, None where they cannot be listed."""
    if all(found is None for found in gpus):
        return _warn("neither NVML nor nvidia-smi says who uses the GPUs", "see that nvidia-smi runs here")
    others = [
        f"GPU {n}: pid {process.pid} with {'an unknown amount' if process.used is None else size(process.used)}"
        for n, found in enumerate(gpus)
        for process in found or ()
        if process.pid != own_pid and (process.used is None or process.used > WORTH_NAMING)
    ]
    if others:
        return _warn(", ".join(others), "end them, or lower gpu_memory_utilization to what they leave")
    return _ok(f"nobody else on {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}")


def open_files(case: Case) -> Finding:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return judge_open_files(limit, most, case.config.max_num_seqs)


def judge_open_files(limit: int, most: int, requests: int) -> Finding:
    """The soft and the hard limit of descriptors."""
    if limit == resource.RLIM_INFINITY or limit >= ENOUGH_FILES + requests:
        return _ok(f"{'no limit' if limit == resource.RLIM_INFINITY else f'limit of {limit}'}")
    remedy = f"ulimit -n {ENOUGH_FILES + requests}" + (f" (as root: the hard limit is {most})" if most == limit else "")
    found = f"limit of {limit}, and {requests} requests at once need {MIN_FILES + requests} and better more"
    return _fail(found, remedy) if limit < MIN_FILES + requests else _warn(found, remedy)


# -- the model


def tensor_parallel(case: Case) -> Finding:
    model, ranks = case.model, case.config.tensor_parallel_size
    model.check_tensor_parallel(ranks)
    return _ok(f"{ranks} of the possible {', '.join(map(str, model.tensor_parallel_sizes()))}")


def memory(case: Case) -> Finding:
    model, config = case.model, case.config
    resolved = config.resolved(model, cuda=case.gpus > 0)
    plan = plan_weights(resolved, model)
    if case.gpus:
        from ...runtime.memory import gpu  # imports torch

        plans = [gpu.plan_on_gpu(plan, resolved, device) for device in gpu.devices(case.gpus)]
        plan = min(plans, key=lambda plan: plan.room or 0)
    if resolved.device == "cuda" and plan.total is None:
        return _warn(f"{size(plan.weights)} of weights on each rank, and no GPU here to hold them", "see devices")
    return judge_memory(config, resolved, plan, _host_memory())


def judge_memory(asked: Config, resolved: Config, plan: MemoryPlan, host: int) -> Finding:
    """The plan of the rank with the least room; `host`: bytes available to ranks on CPUs."""
    check_weights(plan)
    plan = plan.with_pages(resolved)
    check_kv_cache(asked, plan)
    assert resolved.max_model_len is not None
    context = plan.longest_context(resolved.max_model_len)
    rest = "" if plan.total is None else ", less what graphs and activations will take"
    found = (
        f"each rank on {plan.place}: {size(plan.weights)} of weights, {size(plan.kv_cache)} of KV cache for"
        f" {plan.tokens:,} tokens{rest}, longest context {context:,}"
    )
    needed = (plan.weights + plan.kv_cache) * resolved.tensor_parallel_size
    if plan.total is None and needed > host:
        return _warn(f"{found}; in all {size(needed)}, and {size(host)} are available", "lower --kv-cache-memory")
    if context < resolved.max_model_len:
        return _warn(f"{found} of the model's {resolved.max_model_len:,}", "give the KV cache more room")
    return _ok(found)


def checkpoint(case: Case) -> Finding:
    if case.config.load_format == "dummy":
        return _ok("skipped: load_format is dummy")
    files = check_files(case.folder)
    return _ok(f"{len(files)} safetensors, {size(sum(file.stat().st_size for file in files))}, headers readable")


def tokenizer(case: Case) -> Finding:
    """By its Rust core where there is a tokenizer.json: transformers, which only wraps that one, takes two seconds."""
    path = case.folder / "tokenizer.json"
    if not path.is_file():
        try:
            Tokenizer(case.folder)
        except ValueError as error:
            return _fail(_first_line(error), "fetch the checkpoint's tokenizer files")
        return _ok("no tokenizer.json, so transformers converts what there is at every start")
    try:
        settings = case.folder / "tokenizer_config.json"
        if settings.is_file():
            json.loads(settings.read_text())
        words = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # noqa: BLE001 - tokenizers raises no other type of its own
        return _fail(f"{path} cannot be read ({_first_line(error)})", "fetch the file again")
    return _ok(f"tokenizer.json, {words:,} tokens")


ALONE: dict[str, Callable[[Case], Finding]] = {"devices": devices}  # a cluster is asked as a whole
CHECKS: dict[str, Callable[[Case], Finding]] = {
    "packages": packages,
    "tensor parallel": tensor_parallel,
    "checkpoint": checkpoint,
    "tokenizer": tokenizer,
    "memory": memory,
    "neighbours": neighbours,
    "NCCL": nccl,
    "peer access": peers,
    "interface": interface,
    "shared memory": shared_memory,
    "open files": open_files,
}


def versions(case: Case) -> dict[str, str]:
    """What must be equal on all nodes."""
    library = {}
    if case.gpus:
        from ...comm.nccl_library import open_library  # imports torch

        library = {"NCCL": str(open_library(case.config.nccl_library))}
    named = {name: _version(name) for name in ("lockstep", "torch", "ray", "transformers")}
    return {
        "Python": platform.python_version(),
        **{name: version or "none" for name, version in named.items()},
        **library,
    }


def _ok(finding: str) -> Finding:
    return Finding("", "ok", finding)


def _warn(finding: str, remedy: str) -> Finding:
    return Finding("", "warn", finding, remedy)


def _fail(finding: str, remedy: str) -> Finding:
    return Finding("", "fail", finding, remedy)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _host_memory() -> int:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 2**10
