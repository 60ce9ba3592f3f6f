"""The experts of one layer on one rank, divided by features or whole (--enable-expert-parallel); one GPU.

    python scripts/bench/bench_expert_division.py

Each GPU time is that of `ops.experts` with the rank's shapes in bfloat16, in a CUDA graph, with random routing that is
uniform. Whole experts: the slowest of the first four ranks, for which the others wait. Microseconds.
"""

from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor

from lockstep.kernels import ops

# Hidden size, intermediate features, experts, experts of a token.
MODELS = {
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "Qwen3.6-35B-A3B": (2048, 512, 256, 8),
    "GLM-4.5-Air": (4096, 1408, 128, 8),
}
TOKENS, CALLS, REPLAYS = (1, 8, 64, 256, 2048), 6, 3


def matrices(experts: int, size: int, features: int) -> list[tuple[Tensor, Tensor]]:
    """Return the experts of two layers: one alone could stay in the L2 cache."""
    shapes = (experts, 2 * features, size), (experts, size, features)
    return [tuple(torch.randn(*s, device="cuda", dtype=torch.bfloat16) / 50 for s in shapes) for _ in range(2)]  # type: ignore[misc]


def microseconds(x: Tensor, expert_ids: Tensor, scores: Tensor, layers: list[tuple[Tensor, Tensor]]) -> float:
    ops.experts(x, expert_ids, scores, *layers[0])  # kernels load outside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _, layer in zip(range(CALLS), cycle(layers), strict=False):
            ops.experts(x, expert_ids, scores, *layer)
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (CALLS * REPLAYS)


def main() -> None:
    print(f"{'model':>18}{'ranks':>7}{'tokens':>8}{'features':>10}{'whole':>8}")
    for model, (size, features, experts, choices) in MODELS.items():
        for ranks in (2, 4, 8):
            count = experts // ranks
            divided, whole = matrices(experts, size, features // ranks), matrices(count, size, features)
            for tokens in TOKENS:
                x = torch.randn(tokens, size, device="cuda").bfloat16()
                expert_ids = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :choices].contiguous()
                scores = torch.rand(tokens, choices, device="cuda")
                slowest = max(
                    microseconds(x, expert_ids - rank * count, scores, whole) for rank in range(min(ranks, 4))
                )
                by_features = microseconds(x, expert_ids, scores, divided)
                print(f"{model:>18}{ranks:>7}{tokens:>8}{by_features:>10.1f}{slowest:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
