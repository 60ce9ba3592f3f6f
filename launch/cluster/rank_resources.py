"""The resources of one rank and of a local cluster, without Ray: the doctor starts sooner and needs no cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ...runtime.config import Config

LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's minimum: tensors never travel through it


def bundle(config: Config, *, cuda: bool) -> dict[str, float]:
    """Return the resources of one rank."""
    return {"CPU": 1, "GPU": config.gpus_per_rank} if cuda else {"CPU": 1}


def fitting(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Return the number of bundles that an empty node holds."""
    return min(int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())


@dataclass(frozen=True)
class LocalCluster:
    """The size of a local cluster, and whether Ray starts a worker for each CPU at once, before there are actors."""

    num_cpus: int
    starts_workers: bool


def local_cluster(config: Config, replicas: int = 1) -> LocalCluster:
    """Return the local cluster for these ranks.

    The ranks of one group take all CPUs, so that Ray can start their workers in advance. With several groups, Ray
    Serve's actors would take these workers, and must not wait for CPUs.
    """
    num_ranks = replicas * config.tensor_parallel_size
    if replicas == 1:
        return LocalCluster(num_ranks, starts_workers=True)
    return LocalCluster(max(os.cpu_count() or 1, num_ranks), starts_workers=False)
