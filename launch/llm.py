"""`lockstep.LLM`: the offline API over the executor that fits the configuration."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.config import DEMO_MODEL, Config
from ..runtime.executor import Executor, LocalExecutor
from ..runtime.hub import checkpoint_folder
from ..runtime.llm import OfflineLLM
from ..runtime.model.config import ModelConfig
from ..runtime.model.files import check_files
from ..runtime.tokenizer import Tokenizer
from .signals import signals_wait

if TYPE_CHECKING:
    from .cluster import Connection

log = logging.getLogger(__name__)


class LLM(OfflineLLM):
    """A model ready to generate: `with LLM("org/name", tensor_parallel_size=2) as llm: llm.generate(["Once"])`.

    Options are the fields of Config. One rank without a Ray address runs in this process; otherwise each rank is a Ray
    actor. Raises ValueError, in one line, for a model or an option that cannot work.
    """

    def __init__(self, model: str = DEMO_MODEL, **options: Any) -> None:
        self.config = Config.from_options({"model": model, **options})
        folder, described = find_model(self.config)
        tokenizer = Tokenizer(folder)
        super().__init__(start_executor(self.config, described, folder), described, folder, tokenizer)


def find_model(config: Config) -> tuple[Path, ModelConfig]:
    """The checkpoint's folder and its description; raises ValueError for what no rank could load."""
    folder = checkpoint_folder(config.model, config.revision)
    model = ModelConfig.from_folder(folder)
    model.check_tensor_parallel(config.tensor_parallel_size)
    if config.load_format != "dummy":
        check_files(folder)  # before ranks are started for them
    return folder, model


def connect_ray(config: Config, replicas: int = 1) -> Connection | None:
    """What executors that are started one after the other share; None where the one rank runs in this process."""
    if replicas == 1 and _in_process(config):
        return None
    with signals_wait():  # Ray costs 0.4 s, and one rank does not need it
        from .cluster import Connection

    return Connection(config, replicas)


def start_executor(config: Config, model: ModelConfig, folder: Path, connection: Connection | None = None) -> Executor:
    """The executor that fits the configuration, ready for requests; it connects to Ray by itself if it must."""
    if _in_process(config):
        log.info("one rank: running in this process, without Ray")
        return LocalExecutor(config, model, folder)
    with signals_wait():
        from .cluster import RayExecutor

    return RayExecutor(config, model, folder, connection)


def start_fleet(config: Config, folder: Path, connection: Connection, replicas: int, max_queued: int) -> Executor:
    """Several groups of ranks behind one Executor; raises ValueError where Ray Serve is not installed."""
    try:
        from .fleet.executor import FleetExecutor
    except ImportError as error:
        raise ValueError(
            f"replicas={replicas} needs Ray Serve, and {error.name} is missing; pip install 'lockstep[serve]'"
        ) from error
    return FleetExecutor(config, folder, connection, replicas, max_queued)


def _in_process(config: Config) -> bool:
    return config.tensor_parallel_size == 1 and not (config.ray_address or os.environ.get("RAY_ADDRESS"))
