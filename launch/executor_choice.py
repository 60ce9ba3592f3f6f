"""The choice of an executor, the engine's client side: in this process or a child, on Ray actors, or over replicas."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version

from ..comm.message_sockets import WakeupEvent
from ..runtime.config import Config
from ..runtime.executor import Executor, LocalExecutor
from ..runtime.model.model_config import ModelConfig
from ..runtime.startup_timer import log_ready
from .cluster.ray_address import uses_local_ray
from .process_executor import ProcessExecutor
from .signals import signals_wait

if TYPE_CHECKING:
    from .cluster.connection import Connection

AUTHENTICATED_SERVE = Version("2.58")  # the first version whose replicas ask for the token at each of their ports


def connect_ray(config: Config, replicas: int = 1) -> Connection | None:
    """Connect to Ray for executors that are started one after another; return None for a rank in this process."""
    if replicas == 1 and _in_process(config):
        return None
    with signals_wait():  # Ray costs 0.4 s, and one rank does not need it
        from .cluster.connection import Connection

    return Connection(config, replicas)


def start_executor(config: Config, model: ModelConfig, folder: Path, connection: Connection | None = None) -> Executor:
    """Start the executor that fits the configuration; without a `connection` it connects to Ray if it needs to."""
    if _in_process(config):
        executor = LocalExecutor(config, model, folder)
        log_ready("1 rank in this process", executor.startup)
        return executor
    with signals_wait():
        from .cluster.ray_executor import RayExecutor

    return RayExecutor(config, model, connection)


def start_server_executor(
    config: Config,
    model: ModelConfig,
    folder: Path,
    connection: Connection | None,
    wakeup: WakeupEvent,
    replicas: int,
    max_queued: int,
) -> Executor:
    """Start the executor of a server, for the first time or after a failure.

    `connection` is the result of connect_ray; `wakeup` is that of the connection, if there is one.
    """
    if replicas > 1:
        assert connection is not None, "several groups of ranks need Ray"
        return start_replicas(config, connection, replicas, max_queued)
    if connection is None and runs_on_gpu(config):
        return ProcessExecutor(config, folder, wakeup)
    return start_executor(config, model, folder, connection)


def runs_on_gpu(config: Config) -> bool:
    """Return whether a rank in this process, or in a child process, would run on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()  # this makes no CUDA context


def start_replicas(config: Config, connection: Connection, replicas: int, max_queued: int) -> Executor:
    """Start several groups of ranks behind one Executor; raises ValueError without a Ray Serve that fits."""
    version = metadata.version("ray")
    if Version(version) < AUTHENTICATED_SERVE:
        reason = f"needs Ray {AUTHENTICATED_SERVE} or later, and this is {version}: it would run code of everybody"
        raise ValueError(f"replicas={replicas} {reason} who reaches a replica; pip install 'lockstep[serve]'")
    try:
        from .replicas.replica_executor import ReplicaExecutor
    except ImportError as error:
        remedy = f"{error.name} is missing; pip install 'lockstep[serve]'"
        raise ValueError(f"replicas={replicas} needs Ray Serve, and {remedy}") from error
    return ReplicaExecutor(config, connection, replicas, max_queued)


def _in_process(config: Config) -> bool:
    return uses_local_ray(config) and config.tensor_parallel_size == 1
