"""The resources of one rank and of a local cluster, without Ray: the doctor starts sooner and needs no cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ...runtime.config import Config

LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum: tensors never travel through it


def bundle(config: Config, *, cuda: bool) -> dict[str, float]:
    """Return the resources of one rank."""
    return {"CPU": 1, "GPU": config.gpus_per_rank} if cuda else {"CPU": 1}


def fitting(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return the number of bundles that an empty node holds."""
    return min(int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())


def local_cpus(config: Config, replicas: int = 1) -> int:
    """Return the CPUs of a local cluster: those of this machine, or one for each rank if there are more ranks."""
    return max(os.cpu_count() or 1, replicas * config.tensor_parallel_size)
