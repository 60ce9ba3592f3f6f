"""The seam between the front end and the ranks: whoever runs them, in this process or on Ray actors, looks the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from ..comm.base import Communicator, SingleRank
from .config import Config
from .engine import Engine
from .memory import MemoryPlan, check_kv_cache
from .model.config import ModelConfig
from .phases import Phases, summary
from .plan import StepOutput
from .request import Request
from .runner import Runner
from .scheduler import Limits, Scheduler
from .stats import EngineStats, Profile

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Takes requests, gives what the steps produced; `limits` are what every request must keep to."""

    limits: Limits
    startup: dict[str, float]  # what Phases.record returned

    @property
    def stats(self) -> EngineStats:
        """The engine's counters as of the last `poll`; the reading does not change."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once."""

    def cancel(self, uids: Sequence[int]) -> None:
        """End requests early; each still ends with a Finished, reason "abort", unless it had ended before."""

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """What has come since the last call; waits up to timeout_s for something. Raises if the ranks failed."""

    def start_profile(self, num_steps: int) -> None:
        """Trace up to `num_steps` decode steps on rank 0, from the next one on; requests must have been submitted."""

    def take_profile(self) -> Profile | None:
        """The profile that was asked for, once, if a `poll` has brought it."""

    def close(self) -> None:
        """End the ranks and free what they hold; live requests are dropped."""


class LocalExecutor:
    """One rank in this process, without Ray; a step runs inside `poll`."""

    def __init__(self, config: Config, model: ModelConfig, folder: Path) -> None:
        if config.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} needs Ray actors; in one process it is 1"
            )
        phases = Phases()
        resolved = config.resolved(model, cuda=torch.cuda.is_available())
        runner = load_rank(resolved, model, folder, SingleRank(), phases)
        self.memory = runner.plan_memory()
        self.limits = plan_limits(config, resolved, model, self.memory)
        runner.allocate(self.limits)
        self.startup = phases.record()
        log.info(summary(self.startup))
        self._engine = Engine(Scheduler(self.limits), runner, publish=lambda plan: None, overlap=runner.overlaps)

    def submit(self, requests: Sequence[Request]) -> None:
        self._engine.add(requests)

    def cancel(self, uids: Sequence[int]) -> None:
        self._engine.cancel(uids)

    def poll(self, timeout_s: float) -> list[StepOutput]:
        return [self._engine.step()] if self._engine.has_work else []

    @property
    def stats(self) -> EngineStats:
        return msgspec.structs.replace(self._engine.stats)

    def start_profile(self, num_steps: int) -> None:
        self._engine.start_profile(num_steps)

    def take_profile(self) -> Profile | None:
        return self._engine.take_profile()

    def close(self) -> None:
        self._engine.runner.close()


def load_rank(
    config: Config, model: ModelConfig, folder: Path, comm: Communicator, phases: Phases | None = None
) -> Runner:
    """This process's rank with its weights loaded; `config` is resolved. Raises ValueError for what does not fit.

    What the start takes is added to `phases`.
    """
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device='cuda', but torch sees no GPU here; use device='cpu' or install a CUDA build of torch"
            )
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
    return Runner(config, model, folder, comm, torch.device(config.device), phases)


def plan_limits(asked: Config, config: Config, model: ModelConfig, memory: MemoryPlan) -> Limits:
    """What the group can hold with the memory of its tightest rank; logs it.

    `asked` is the user's Config, `config` the resolved one. Raises ValueError where pages, GiB or a context that was
    asked for do not fit; a context that was not is limited to what does.
    """
    check_kv_cache(asked, memory)
    assert config.max_model_len is not None
    limits = Limits(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_pages=memory.num_pages,
        page_size=config.page_size,
        vocab_size=model.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    if memory.tokens < limits.max_model_len:
        log.warning(
            "context limited to %d tokens by the KV cache (the model's is %d)", memory.tokens, limits.max_model_len
        )
        limits = replace(limits, max_model_len=memory.tokens)
    log.info("%s", memory.table(limits.max_model_len))
    log.info("KV cache: %d pages of %d tokens, %s", memory.num_pages, memory.page_size, config.kv_layout)
    return limits
