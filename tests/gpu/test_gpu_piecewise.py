"""Piecewise graphs on GPUs: each step of whole runs has the bits of the same launches without graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from piecewise_comparison import compare_piecewise

from lockstep.comm.base import Communicator, SingleRank
from lockstep.runtime.request import Request

from checkpoints import tiny_checkpoint
from engines import request
from mxfp4_checkpoints import mxfp4_checkpoint
from rank_processes import on_gpus, place_id, run_processes

SIZES: dict[str, Any] = {"head_dim": 64, "hidden_size": 256, "sliding_window": 20, "max_position_embeddings": 256}
MODELS: dict[str, Callable[[Path], Any]] = {
    "dense": lambda folder: tiny_checkpoint(folder, "LlamaForCausalLM", **SIZES),
    "experts": lambda folder: tiny_checkpoint(folder, "Qwen3MoeForCausalLM", **SIZES),
    "gpt-oss": lambda folder: mxfp4_checkpoint(folder, **SIZES, num_experts_per_tok=4),
    "delta rule": lambda folder: tiny_checkpoint(folder, "Qwen3_5MoeForCausalLM", **SIZES),
    "norms after layers": lambda folder: tiny_checkpoint(folder, "Olmo3ForCausalLM", **SIZES),
}
CASES = [(model, {}) for model in MODELS] + [
    ("dense", {"quantization": "fp8"}),
    ("dense", {"kv_cache_dtype": "fp8"}),
    ("dense", {"deterministic": True}),
    ("dense", {"dtype": "float16", "overlap_scheduling": False}),
]


def requests() -> list[Request]:
    """Return requests of which some arrive while others decode; the prompts have up to 120 tokens."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 131, int(n)).tolist() for n in rng.integers(1, 120, 14)]
    return [request(i, prompt, max_tokens=4 + 2 * i, temperature=i % 2) for i, prompt in enumerate(prompts)]


def steps_of(comm: Communicator, folder: str, **options: Any) -> tuple[list[tuple[int, bool, bool]], dict[int, Any]]:
    """Return the compared steps and the tokens of each request."""
    options = {"device": "cuda", "dtype": "bfloat16", "max_num_batched_tokens": 96, "max_num_seqs": 8, **options}
    comparison = compare_piecewise(comm, Path(folder), requests(), **options)
    return comparison.steps, comparison.results.tokens


def check(steps: list[tuple[int, bool, bool]]) -> None:
    assert [count for count, _, same in steps if not same] == []
    assert sum(is_mixed for _, is_mixed, _ in steps) >= 3
    assert any(count % 8 for count, _, _ in steps), "meant to pad"


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "options"), CASES, ids=str)
def test_steps_have_the_bits_of_their_launches(tmp_path: Path, model: str, options: dict[str, Any]) -> None:
    MODELS[model](tmp_path)
    steps, _ = steps_of(SingleRank(), str(tmp_path), **options)
    check(steps)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=str)
@pytest.mark.parametrize("place", [(2, 1)], ids=place_id)
def test_steps_of_two_ranks_have_the_bits_of_their_launches(
    tmp_path: Path, place: tuple[int, int], options: dict[str, Any]
) -> None:
    MODELS["dense"](tmp_path)
    job = functools.partial(steps_of, folder=str(tmp_path), gpus_per_rank=0.5, **options)
    where = on_gpus(*place) | {"batch_invariant": bool(options)}
    ranks = run_processes(2, job, timeout_s=30.0, hidden_size=SIZES["hidden_size"], **where)
    for steps, _ in ranks:
        check(steps)
    assert ranks[0] == ranks[1]
