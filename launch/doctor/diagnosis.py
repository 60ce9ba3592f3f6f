"""`lockstep doctor`: the findings about a start, on this machine or on the cluster that it would use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from ...runtime.config import Config
from .finding import Finding, run_check
from .gpu_checks import check_devices, check_gpu_processes, check_nccl, check_p2p
from .machine_checks import check_interface, check_open_files, check_packages, check_shared_memory
from .model_checks import check_checkpoint, check_memory, check_tensor_parallel, check_tokenizer
from .p2p import start_p2p_check
from .planned_start import LOOPBACK, PlannedStart

Check = Callable[[PlannedStart], Finding]
LOCAL_CHECKS: dict[str, Check] = {"devices": check_devices}  # on a cluster, one check counts all nodes
CHECKS: dict[str, Check] = {
    "packages": check_packages,
    "tensor parallel": check_tensor_parallel,
    "checkpoint": check_checkpoint,
    "tokenizer": check_tokenizer,
    "memory": check_memory,
    "neighbours": check_gpu_processes,
    "NCCL": check_nccl,
    "peer access": check_p2p,
    "interface": check_interface,
    "shared memory": check_shared_memory,
    "open files": check_open_files,
}


def diagnose(config: Config) -> Iterator[Finding]:
    """Yield each finding about a start with `config` as soon as its check ends."""
    if (config.ray_address or os.environ.get("RAY_ADDRESS", "local")) == "local":
        yield from examine(config, LOOPBACK, alone=True)
        return
    from .cluster_survey import survey  # imports Ray: half a second

    yield from survey(config, examine)


def examine(config: Config, ip: str, *, alone: bool) -> Iterator[Finding]:
    """Yield the findings of this machine, which other ranks reach at `ip`; `alone`: all ranks would run here."""
    with start_p2p_check(config) as p2p:
        start = PlannedStart(config, ip, starts_ray=alone and config.tensor_parallel_size > 1, p2p=p2p)
        for name, check in {**(LOCAL_CHECKS if alone else {}), **CHECKS}.items():
            yield run_check(name, partial(check, start))
