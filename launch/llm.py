"""`lockstep.LLM`: the offline API over the executor that fits the configuration."""

from __future__ import annotations

from typing import Any

from ..runtime.config import DEMO_MODEL, Config
from ..runtime.model.checkpoint import find_model
from ..runtime.offline import OfflineLLM
from ..runtime.startup_timer import count_from_here
from .cluster.ray_starter import start_ray_ahead
from .executor_choice import start_executor
from .signals import signals_wait
from .text_process import IsolatedTokenizer


class LLM(OfflineLLM):
    """A model ready to generate: `with LLM("org/name", tensor_parallel_size=2) as llm: llm.generate(["Once"])`.

    Options are the fields of Config. One rank without a Ray address runs in this process; otherwise each rank is a Ray
    actor. Raises ValueError, in one line, for a model or an option that cannot work.
    """

    @count_from_here()
    def __init__(self, model: str = DEMO_MODEL, **options: Any) -> None:
        self.config = Config.from_options({"model": model, **options})
        folder, model_config = find_model(self.config)
        with start_ray_ahead(self.config):
            with signals_wait():
                import transformers.models.auto.tokenization_auto  # noqa: F401 - the tokenizer needs it: 1 to 2 s

            self._isolated = tokenizer = IsolatedTokenizer(folder)
            executor = start_executor(self.config, model_config, folder)
        super().__init__(executor, model_config, folder, tokenizer, self.config.generation_config)

    def close(self) -> None:
        """End the ranks and the process of the chat template; they have ended when this returns. Safe to call twice."""
        self._isolated.close()
        super().close()
