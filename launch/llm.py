"""`lockstep.LLM`: the offline API over the executor that fits the configuration."""

from __future__ import annotations

import logging
import os
from typing import Any

from ..runtime.config import DEMO_MODEL, Config
from ..runtime.executor import Executor, LocalExecutor
from ..runtime.hub import checkpoint_folder
from ..runtime.llm import OfflineLLM
from ..runtime.model.config import ModelConfig
from ..runtime.model.weights import check_files
from ..runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class LLM(OfflineLLM):
    """A model ready to generate: `with LLM("org/name", tensor_parallel_size=2) as llm: llm.generate(["Once"])`.

    Options are the fields of Config. One rank without a Ray address runs in this process; otherwise each rank is a Ray
    actor. Raises ValueError, in one line, for a model or an option that cannot work.
    """

    def __init__(self, model: str = DEMO_MODEL, **options: Any) -> None:
        self.config = Config.from_options({"model": model, **options})
        folder = checkpoint_folder(self.config.model, self.config.revision)
        described = ModelConfig.from_folder(folder)
        described.check_tensor_parallel(self.config.tensor_parallel_size)
        if self.config.load_format != "dummy":
            check_files(folder)  # before ranks are started for them
        tokenizer = Tokenizer(folder)
        executor: Executor
        address = self.config.ray_address or os.environ.get("RAY_ADDRESS")
        if self.config.tensor_parallel_size == 1 and not address:
            log.info("one rank: running in this process, without Ray")
            executor = LocalExecutor(self.config, described, folder)
        else:
            from .cluster import RayExecutor  # Ray costs 0.4 s, and one rank does not need it

            executor = RayExecutor(self.config, described, folder)
        super().__init__(executor, described, folder, tokenizer)
