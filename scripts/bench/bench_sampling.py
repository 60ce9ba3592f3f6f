"""The cost of sampling, by op and by step: top-k, top-p and min-p beside plain sampling.

    python scripts/bench/bench_sampling.py [FOLDER_WITH_CONFIG_JSON]

Without a folder: each op alone, in a CUDA graph, beside torch's topk and sort. With a folder: milliseconds per step of
that model with random weights, 128 tokens in and 64 out; the prefill is divided among the steps; the best of two runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lockstep.comm.base import SingleRank
from lockstep.comm.timing import graph_us
from lockstep.kernels import ops
from lockstep.launch.bench.engine_benchmark import EngineBenchmark
from lockstep.launch.bench.workload import batch
from lockstep.runtime.config import Config

GRAPH_LENGTH = 10
OUTPUT_LEN = 64
SAMPLING: dict[str, dict[str, float]] = {
    "plain": {},
    "top_k=20 top_p=0.95": {"top_k": 20, "top_p": 0.95},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
}


def time_ops(rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab, device="cuda").bfloat16()
    full = partial(torch.full, (rows,), device="cuda")
    temperature, top_k, top_p, min_p = full(0.6), full(20), full(0.9), full(0.0)
    keys = torch.arange(rows, device="cuda")
    candidates, float_logits = ops.topk_candidates(logits, 64), logits.float()
    calls = {
        "gumbel_argmax": lambda: ops.merge_candidates(ops.gumbel_argmax(logits, temperature, keys).unsqueeze(0)),
        "topk_candidates 64": lambda: ops.topk_candidates(logits, 64),
        "sample_topk": lambda: ops.sample_topk(candidates, temperature, top_k, top_p, min_p, keys),
        "sample_top_p": lambda: ops.sample_top_p(float_logits, temperature, top_p, min_p, keys),
        "torch topk 64": lambda: logits.topk(64),
        "torch sort": lambda: float_logits.sort(dim=-1, descending=True, stable=True),
    }
    print(f"{vocab} {rows:4}", *(f"{name} {us_of(call):.1f}" for name, call in calls.items()), sep="  ", flush=True)


def us_of(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return graph_us(SingleRank(), call, length=GRAPH_LENGTH, times=1)


def time_steps(folder: str) -> None:
    workloads = {rows: batch(rows, 128, OUTPUT_LEN) for rows in (1, 64, 256)}
    with EngineBenchmark(Config(model=folder, load_format="dummy"), list(workloads.values())) as bench:
        for rows, workload in workloads.items():
            for name, sampling in SAMPLING.items():
                best_s = min(bench.run(replace(workload, sampling=sampling), times=2).seconds)
                print(f"{rows:4}  {name:20} {best_s / OUTPUT_LEN * 1000:.3f} ms a step", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        time_steps(sys.argv[1])
    else:
        for vocab_size in (151_936, 128_256):
            for num_rows in (1, 8, 64, 256):
                time_ops(num_rows, vocab_size)
