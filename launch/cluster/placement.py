"""The placement of ranks in the Ray cluster, or the reason why there is no room."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.placement_group import placement_group as create_placement_group

from ...runtime.config import Config
from ..errors import PlacementError
from .connection import Connection
from .rank_resources import bundle, fitting

log = logging.getLogger(__name__)
WAIT_LIMIT_S = 60.0  # default wait for resources in use and for nodes lost in a failure
POLL_S = 1  # Ray takes whole seconds
FIRST_REPORT_S, REPORT_S = 2.0, 10.0


def place(config: Config, connection: Connection, *, again: bool = False) -> PlacementGroup:
    """Reserve a bundle for each rank (index = rank), on as few nodes as possible; `config` is resolved.

    Raises PlacementError if the cluster is too small: after a wait for more nodes, if the user configured one or the
    ranks are placed `again` after a failure, and at once otherwise. Raises it after a wait if the cluster is too busy.
    Raises what `connection.check` raises.
    """
    resources = ResourceRequest(bundle(config, cuda=config.device == "cuda"), config.tensor_parallel_size)
    if config.wait_for_resources is None and not again and not resources.fits():
        raise PlacementError(resources.shortage())
    placement_group = create_placement_group([resources.bundle] * resources.number, strategy="PACK")
    try:
        _wait(placement_group, resources, config.wait_for_resources or WAIT_LIMIT_S, connection)
    except BaseException:
        connection.while_usable(remove_placement_group, placement_group)
        raise
    return placement_group


@dataclass(frozen=True)
class ResourceRequest:
    """`number` bundles of resources."""

    bundle: dict[str, float]
    number: int

    def __str__(self) -> str:
        return f"{self.number} ranks with {_amounts(self.bundle)} each"

    def fits(self) -> bool:
        """Return whether the cluster's nodes would have room if they were idle."""
        return sum(fitting(node["Resources"], self.bundle) for node in nodes()) >= self.number

    def shortage(self) -> str:
        remedies = "add nodes, wait for some with --wait-for-gpus SECONDS, or use a smaller tensor_parallel_size"
        return f"{self} never fit in this Ray cluster: {_table()}; {remedies}"


def _wait(placement_group: PlacementGroup, resources: ResourceRequest, limit_s: float, connection: Connection) -> None:
    started = time.perf_counter()
    report = started + FIRST_REPORT_S
    while not placement_group.wait(POLL_S):
        now = time.perf_counter()
        connection.check()
        if now - started >= limit_s:
            waited = f"{now - started:.0f} s"
            if not resources.fits():
                raise PlacementError(f"after {waited}, {resources.shortage()}")
            remedies = "free resources or raise --wait-for-gpus"
            raise PlacementError(f"no room for {resources} within {waited}, others hold it: {_table()}; {remedies}")
        if now >= report:
            cause = "others hold them" if resources.fits() else "nodes are missing"
            log.warning("waiting for %s, %.0f of %.0f s, %s: %s", resources, now - started, limit_s, cause, _table())
            report = now + REPORT_S


def nodes() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the cluster's live nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources)


def _table() -> str:
    """Return each node with its CPUs and GPUs, and the free resources of all of them."""
    amounts = [f"{n['NodeManagerAddress']} has {_amounts(n['Resources']) or 'no CPU or GPU'}" for n in nodes()]
    return f"{'; '.join(amounts)}; free in all: {_amounts(ray.available_resources()) or 'nothing'}"
