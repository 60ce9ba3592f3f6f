"""Numbers of ranks that divide neither heads nor features: their tokens are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import tiny_checkpoint
from engines import Results, request, run_engine

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "9 heads on 3": ("LlamaForCausalLM", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}),
    "14 heads on 2": (
        "Qwen2ForCausalLM",
        {"num_attention_heads": 14, "hidden_size": 112, "head_dim": 8, "intermediate_size": 80},
    ),
    "wide norms": ("Olmo2ForCausalLM", {"num_attention_heads": 14, "hidden_size": 28, "intermediate_size": 96}),
    "experts": (
        "Qwen3MoeForCausalLM",
        {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 28, "moe_intermediate_size": 40},
    ),
    "shared experts": ("Glm4MoeForCausalLM", {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 28}),
    "sinks": ("GptOssForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 56}),
    "fused tensors": ("Phi3ForCausalLM", {"num_attention_heads": 8, "num_key_value_heads": 4}),
}
NIGHTLY = [(shape, size) for shape in SHAPES for size in (3, 5, 6, 7)]
DAILY = [("9 heads on 3", 2), ("wide norms", 5)]


def _run(folder: Path, size: int) -> Results:
    """Run mixed requests with a shared prefix, chunks, and too few pages for all."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, 131, 21).tolist()
    prompts = [prefix + generator.integers(3, 131, n).tolist() for n in (1, 5, 9)] + [[5], [7] * 40, prefix]
    requests = [request(n, prompt, max_tokens=64) for n, prompt in enumerate(prompts)]
    return run_engine(folder, requests, tp=size, num_pages=80, max_num_seqs=5, max_num_batched_tokens=7)


@pytest.mark.parametrize(
    ("shape", "size"), DAILY + [pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY if case not in DAILY]
)
def test_any_number_of_ranks_gives_the_tokens_of_one(tmp_path: Path, shape: str, size: int) -> None:
    architecture, overrides = SHAPES[shape]
    tiny_checkpoint(tmp_path, architecture, **overrides)
    one, several = _run(tmp_path, 1), _run(tmp_path, size)
    assert one.preemptions > 0
    assert any(one.cached.values())
    assert several.tokens == one.tokens
