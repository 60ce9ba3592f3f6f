"""A place in the Ray cluster for every rank, or a plain answer why there is none."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ...runtime.config import Config
from ..errors import PlacementError
from .resources import bundle, fitting

log = logging.getLogger(__name__)
PATIENCE_S = 60.0  # for resources that others hold, and for nodes that a failure has taken
WAIT_S = 1  # Ray takes whole seconds
FIRST_REPORT_S, REPORT_S = 2.0, 10.0


def place(config: Config, leaving: threading.Event, *, again: bool = False) -> PlacementGroup:
    """Reserve a bundle for each rank (index = rank), on as few nodes as possible; `config` is resolved.

    Raises PlacementError: at once if the cluster is too small, unless nodes are waited for, because the user asked for
    that or the ranks are placed `again` after a failure; after the wait if it still is or is too busy.
    """
    each = bundle(config, cuda=config.device == "cuda")
    wanted = Wanted(each, config.tensor_parallel_size)
    if config.wait_for_resources is None and not again and not wanted.fits():
        raise PlacementError(wanted.shortage())
    group = placement_group([each] * wanted.number, strategy="PACK")
    try:
        _wait(group, wanted, config.wait_for_resources or PATIENCE_S, leaving)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


@dataclass(frozen=True)
class Wanted:
    """`number` bundles of resources."""

    bundle: dict[str, float]
    number: int

    def __str__(self) -> str:
        return f"{self.number} ranks with {_amounts(self.bundle)} each"

    def fits(self) -> bool:
        """Whether the cluster as it is has room, if nobody else used it."""
        return sum(fitting(node["Resources"], self.bundle) for node in nodes()) >= self.number

    def shortage(self) -> str:
        ways = "add nodes, wait for some with --wait-for-gpus SECONDS, or use a smaller tensor_parallel_size"
        return f"{self} never fit in this Ray cluster: {_table()}; {ways}"


def _wait(group: PlacementGroup, wanted: Wanted, limit_s: float, leaving: threading.Event) -> None:
    started = time.perf_counter()
    report = started + FIRST_REPORT_S
    while not group.wait(WAIT_S):
        now = time.perf_counter()
        if leaving.is_set():
            raise PlacementError("the wait for resources was given up, because the service ends")
        if now - started >= limit_s:
            raise PlacementError(_why_not(wanted, now - started))
        if now >= report:
            why = "others hold them" if wanted.fits() else "nodes are missing"
            log.warning("waiting for %s, %.0f of %.0f s, %s: %s", wanted, now - started, limit_s, why, _table())
            report = now + REPORT_S


def _why_not(wanted: Wanted, waited_s: float) -> str:
    if not wanted.fits():
        return f"after {waited_s:.0f} s, {wanted.shortage()}"
    return (
        f"no room for {wanted} within {waited_s:.0f} s, others hold it: {_table()};"
        " free resources or raise --wait-for-gpus"
    )


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources)


def _table() -> str:
    """Each node with its CPUs and GPUs, and what is free in all."""
    amounts = [f"{n['NodeManagerAddress']} has {_amounts(n['Resources']) or 'no CPU or GPU'}" for n in nodes()]
    return f"{'; '.join(amounts)}; free in all: {_amounts(ray.available_resources()) or 'nothing'}"
