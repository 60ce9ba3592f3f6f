"""What it takes to draw a token, by kernel and by step: top-k, top-p and min-p next to a plain draw.

    python scripts/bench/bench_sampling.py [FOLDER_WITH_CONFIG_JSON]

Without a folder: each op alone, in a CUDA graph, next to torch's topk and sort. With one: milliseconds a step of that
model with random weights, 128 tokens in and 64 out, the prefill shared out among the steps; best of two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from lockstep.comm.base import SingleRank
from lockstep.kernels import ops
from lockstep.launch.bench import engine_benchmark
from lockstep.runtime.config import Config
from lockstep.runtime.model.logits import Logits

LENGTH = 10  # of the graph
OUTPUT = 64
KINDS: dict[str, dict[str, float]] = {
    "plain": {},
    "top_k=20 top_p=0.95": {"top_k": 20, "top_p": 0.95},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
}


def graph_us(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LENGTH):
            call()
    graph.replay()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) * 1000 / LENGTH


def time_ops(rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab, device="cuda").bfloat16()
    of_all = Logits(SingleRank(), logits, vocab)
    each = partial(torch.full, (rows,), device="cuda")
    temperature, top_k, top_p, min_p = each(0.6), each(20), each(0.9), each(0.0)
    keys = torch.arange(rows, device="cuda")
    few, whole = of_all.topk_candidates(64), logits.float()
    calls = {
        "race, winners": lambda: of_all.gumbel_argmax(temperature, keys),
        "best 64": lambda: of_all.topk_candidates(64),
        "sample_topk": lambda: ops.sample_topk(few, temperature, top_k, top_p, min_p, keys),
        "sample_top_p": lambda: ops.sample_top_p(whole, temperature, top_p, min_p, keys),
        "torch topk 64": lambda: logits.topk(64),
        "torch sort": lambda: whole.sort(dim=-1, descending=True, stable=True),
    }
    print(f"{vocab} {rows:4}", *(f"{name} {graph_us(call):.1f}" for name, call in calls.items()), sep="  ", flush=True)


def time_steps(folder: str) -> None:
    plain, workloads = (
        engine_benchmark.SamplingParams,
        {rows: engine_benchmark.batch(rows, 128, OUTPUT) for rows in (1, 64, 256)},
    )
    with engine_benchmark.EngineBenchmark(Config(model=folder, load_format="dummy"), list(workloads.values())) as bench:
        for rows, workload in workloads.items():
            for name, fields in KINDS.items():
                engine_benchmark.SamplingParams = partial(plain, **fields)  # type: ignore[assignment, misc]
                seconds = []
                for _ in range(2):
                    began = time.perf_counter()
                    bench.run(workload)
                    seconds.append(time.perf_counter() - began)
                print(f"{rows:4}  {name:20} {min(seconds) / OUTPUT * 1000:.3f} ms a step", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        time_steps(sys.argv[1])
    else:
        for size in (151_936, 128_256):
            for count in (1, 8, 64, 256):
                time_ops(count, size)
