"""A place in the Ray cluster for every rank, or a plain answer why there is none."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ..runtime.config import Config
from .errors import PlacementError
from .resources import LOCAL_OBJECT_STORE_BYTES, bundle, fitting
from .signals import Undo, signals_wait

log = logging.getLogger(__name__)
REMOVE_S = 5.0  # for the last of Ray's processes to end
CONNECT_S = 5.0  # Ray itself tries for two minutes
PATIENCE_S = 60.0  # for resources that others hold, and for nodes that a failure has taken
WAIT_S = 1  # Ray takes whole seconds
FIRST_REPORT_S, REPORT_S = 2.0, 10.0
# In a cluster of our own nobody reads what Ray gathers, and nothing is to be scaled or shown: without all this an idle
# server takes half of its CPU time. Telemetry leaves a thread behind at each shutdown.
QUIET = {"enable_open_telemetry": False, "enable_metrics_collection": False}
# Ray looks for memory that runs short once a second, not four times.
QUIET_ENVIRONMENT = {"REPORTER_UPDATE_INTERVAL_MS": "60000", "RAY_memory_monitor_refresh_ms": "1000"}
HELPERS = ("monitor", "log_monitor", "dashboard")  # processes that `ray.init` starts and has no option against


def start_ray(config: Config, stack: Undo, replicas: int = 1) -> bool:
    """Connect this process to Ray; True if that started a cluster of our own, which `stack` then ends."""
    if ray.is_initialized():
        log.info("using the Ray cluster that this process is connected to")
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else ray.shutdown resets SIGTERM to its default, below Python: one that comes before our own end is done leaves
    # the rest behind. Python's faulthandler, which Ray enables, still says where a process has crashed.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    address = config.ray_address or os.environ.get("RAY_ADDRESS", "local")
    started = time.perf_counter()
    if address == "local":
        for name, value in QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        cpus = max(os.cpu_count() or 1, replicas * config.tensor_parallel_size)
        # Ray's own folder grows with each start; a short name: sockets in it have paths of up to 107 characters.
        folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR"))
        stack.callback(_remove, folder)
        stack.callback(while_connected, ray.shutdown)
        with signals_wait():  # servers that were started half would stay for a minute
            _init(
                address,
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                _system_config=QUIET,
            )
            _end_helpers()
    else:
        _check_reachable(address)
        _init(address)
    log.info("Ray cluster: %s, ready in %.1f s", address, time.perf_counter() - started)
    return address == "local"


def _remove(folder: str) -> None:
    """Remove a folder that processes may still write to, until they have ended too."""
    until = time.monotonic() + REMOVE_S
    while os.path.exists(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > until:
            log.warning("Ray's folder %s cannot be removed", folder)
            return
        time.sleep(0.02)


def _end_helpers() -> None:
    """Those of this process's cluster; a Ray that has other names for them keeps them."""
    node = getattr(ray._private.worker, "_global_node", None)
    for name in HELPERS:
        end = getattr(node, f"kill_{name}", None)
        if end is None:
            log.debug("Ray %s has no kill_%s: this helper stays", ray.__version__, name)
        else:
            end(check_alive=False)


def while_connected(end: Callable[..., Any], *arguments: Any) -> None:
    """Call `end`, unless the user's own ray.shutdown() came first: the call would start Ray again."""
    if ray.is_initialized():
        end(*arguments)


def _init(address: str, **options: Any) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (RayError, ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlacementError(
            f"no Ray cluster at {address}: {reason}; see that it runs, with the same Ray and Python, and that"
            " RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are set as they are there"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray has set a handler of its own, which exits; its processes end with ours in any case.
        signal.signal(signal.SIGTERM, on_sigterm)


def _check_reachable(address: str) -> None:
    """Raises PlacementError within CONNECT_S if nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", and what Ray refuses at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise PlacementError(f"no Ray cluster at {address}: {error}; see that it runs and is reachable") from error


def has_gpus() -> bool:
    """Whether the cluster that this process is connected to has any GPU."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


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
