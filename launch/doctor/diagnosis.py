"""`lockstep doctor`: the findings about a start, on this machine or on the cluster that it would use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ...runtime.config import Config
from ..cluster.ray_address import uses_local_ray
from . import content_checks, machine_checks, model_checks
from .finding import Finding, run_check
from .p2p import start_p2p_check
from .planned_start import LOOPBACK, PlannedStart

Check = Callable[[PlannedStart], Finding]
LOCAL_CHECKS: dict[str, Check] = {"devices": machine_checks.check_devices}  # on a cluster, one check counts all nodes
CHECKS: dict[str, Check] = {
    "packages": machine_checks.check_packages,
    "checkpoint": model_checks.check_checkpoint,
    "tensor parallel": model_checks.check_tensor_parallel,
    "tokenizer": model_checks.check_tokenizer,
    "generation config": model_checks.check_generation_config,
    "memory": model_checks.check_memory,
    "other processes": machine_checks.check_gpu_processes,
    "NCCL": machine_checks.check_nccl,
    "peer access": machine_checks.check_p2p,
    "interface": machine_checks.check_interface,
    "shared memory": machine_checks.check_dev_shm,
    "Ray's folder": machine_checks.check_ray_folder,
    "open files": machine_checks.check_open_files,
}
CONTENT_CHECKS: dict[str, Check] = {  # take seconds, and a start finds out the same
    "weights": content_checks.check_weights,
    "chat template": content_checks.check_chat_template,
}


def diagnose(config: Config, *, reads_contents: bool = False) -> Iterator[Finding]:
    """Yield each finding about a start with `config` as soon as its check ends.

    With `reads_contents` the CONTENT_CHECKS are among them.
    """
    check = partial(examine, reads_contents=reads_contents)
    if uses_local_ray(config):
        yield from check(config, LOOPBACK, alone=True)
        return
    from .cluster_survey import survey  # imports Ray: half a second

    yield from survey(config, check)


def examine(config: Config, ip: str, *, alone: bool, reads_contents: bool = False) -> Iterator[Finding]:
    """Yield the findings of this machine, which other ranks reach at `ip`; `alone`: all ranks would run here."""
    with start_p2p_check(config) as p2p:
        start = PlannedStart(config, ip, alone=alone, p2p=p2p)
        contents = CONTENT_CHECKS if reads_contents else {}
        for name, check in {**(LOCAL_CHECKS if alone else {}), **CHECKS, **contents}.items():
            yield run_check(name, partial(check, start))
