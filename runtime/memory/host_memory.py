"""The memory of the host, which must hold what a rank does not keep on a GPU."""

from __future__ import annotations

import os

from ...comm.message_text import format_bytes
from ..config import Config
from ..model.model_config import ModelConfig
from .memory_plan import MemoryPlan


def check_host_memory(plan: MemoryPlan, config: Config, model: ModelConfig) -> None:
    """Raise ValueError if this host can never hold the rank; Linux would grant the memory and end the process later.

    `config` is resolved. Ranks that share the host are not counted.
    """
    assert config.max_model_len is not None
    rotary = sum(rope.rotary_dim(model.head_dim) for rope in model.rotations)
    parts = {"the rotary tables": 4 * config.max_model_len * rotary}
    if config.device == "cpu":
        parts |= {"weights": plan.weights, "the KV cache": plan.with_pages(config).kv_cache}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(parts.values()) > total:
        needs = ", ".join(f"{format_bytes(size)} for {name}" for name, size in parts.items())
        raise ValueError(
            f"a rank needs {needs}, and this host has {format_bytes(total)} of memory; lower max_model_len"
            f" ({config.max_model_len}) or kv_cache_memory, or use a smaller model"
        )
