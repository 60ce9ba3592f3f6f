"""Start-up of a rank: load its weights, then derive the limits from the memory of all ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from ..comm.base import Communicator
from .config import Config
from .limits import Limits
from .memory.memory_plan import MemoryPlan, check_kv_cache
from .model.model_config import ModelConfig
from .runner.runner import Runner
from .startup_timer import StartupTimer

log = logging.getLogger(__name__)


def load_rank(
    config: Config, model: ModelConfig, folder: Path, comm: Communicator, phases: StartupTimer | None = None
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
