"""The seam between the front end and the ranks: whoever runs them, in this process or on Ray actors, looks the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ..comm.base import Communicator, SingleRank
from .config import Config
from .engine import Engine
from .model.config import ModelConfig
from .plan import StepOutput
from .request import Request
from .runner import Runner
from .scheduler import Limits, Scheduler

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Takes requests, gives what the steps produced; `limits` are what every request must keep to."""

    limits: Limits

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; returns at once."""

    def cancel(self, uids: Sequence[int]) -> None:
        """End requests early; each still ends with a Finished, reason "abort", unless it had ended before."""

    def poll(self, timeout_s: float) -> list[StepOutput]:
        """What has come since the last call; waits up to timeout_s for something. Raises if the ranks failed."""

    def close(self) -> None:
        """End the ranks and free what they hold; live requests are dropped."""


class LocalExecutor:
    """One rank in this process, without Ray; a step runs inside `poll`."""

    def __init__(self, config: Config, model: ModelConfig, folder: Path) -> None:
        if config.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} needs Ray actors; in one process it is 1"
            )
        resolved = config.resolved(model, cuda=torch.cuda.is_available())
        runner = load_rank(resolved, model, folder, SingleRank())
        self.limits = plan_limits(config, resolved, model, runner.num_pages())
        runner.allocate(self.limits)
        self._engine = Engine(Scheduler(self.limits), runner, publish=lambda plan: None, overlap=runner.overlaps)

    def submit(self, requests: Sequence[Request]) -> None:
        self._engine.add(requests)

    def cancel(self, uids: Sequence[int]) -> None:
        self._engine.cancel(uids)

    def poll(self, timeout_s: float) -> list[StepOutput]:
        return [self._engine.step()] if self._engine.has_work else []

    def close(self) -> None:
        self._engine.runner.close()


def load_rank(config: Config, model: ModelConfig, folder: Path, comm: Communicator) -> Runner:
    """This process's rank with its weights loaded; `config` is resolved. Raises ValueError for what does not fit."""
    if config.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device='cuda', but torch sees no GPU here; use device='cpu' or install a CUDA build of torch"
            )
        torch.cuda.set_device(0)  # Ray shows each actor its own GPU only
    return Runner(config, model, folder, comm, torch.device(config.device))


def plan_limits(asked: Config, config: Config, model: ModelConfig, num_pages: int) -> Limits:
    """What the group can hold with `num_pages` pages, the least of its ranks; logs it.

    `asked` is the user's Config, `config` the resolved one. Raises ValueError where a context that was asked for does
    not fit; one that was not is limited to what does.
    """
    assert config.max_model_len is not None
    limits = Limits(
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_pages=num_pages,
        page_size=config.page_size,
        vocab_size=model.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    capacity = num_pages * config.page_size
    if num_pages < 1 or capacity < 2:
        raise ValueError(
            f"the KV cache has room for {max(num_pages, 0)} pages of {config.page_size} tokens after loading the"
            " weights; raise kv_cache_memory or gpu_memory_utilization, or use more ranks"
        )
    if capacity < limits.max_model_len:
        if asked.max_model_len is not None:
            raise ValueError(
                f"max_model_len={asked.max_model_len} needs more than the {capacity} tokens that the KV cache holds;"
                f" use max_model_len={capacity} or less, or raise kv_cache_memory or num_pages"
            )
        log.warning("context limited to %d tokens by the KV cache (the model's is %d)", capacity, limits.max_model_len)
        limits = replace(limits, max_model_len=capacity)
    log.info("KV cache: %d pages of %d tokens, %d in all, %s", num_pages, config.page_size, capacity, config.kv_layout)
    return limits
