"""What the ranks ask of Ray, apart from Ray, so that the doctor need not import it."""

from __future__ import annotations

from collections.abc import Mapping

from ...runtime.config import Config

LOCAL_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least: tensors never travel through it


def bundle(config: Config, *, cuda: bool) -> dict[str, float]:
    """The resources of one rank."""
    return {"CPU": 1, "GPU": config.gpus_per_rank} if cuda else {"CPU": 1}


def fitting(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many bundles an empty node takes."""
    return min(int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())
