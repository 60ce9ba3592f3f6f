"""Microseconds that the products of one layer take, with the norms, SiLU and residuals around them, by rows of x.

    python scripts/bench_products.py FOLDER_WITH_CONFIG_JSON [--rows 1 8 16] [--tiling 16,2,1,0 ...]

All layers of the model one after the other, each with weights of its own, no attention; one CUDA graph, median of 20
replays. "cuBLAS" is the way of more rows than product.cu takes; "chosen" what `ops.linear` does; a --tiling, in warps,
tiles, blocks of a cluster and 1 if x is kept, forces that one on products of so many rows and columns as it can take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from lockstep.kernels import cuda, ops
from lockstep.runtime.model.config import ModelConfig

REPLAYS = 20


@contextmanager
def way(name: str) -> Iterator[None]:
    if name == "cuBLAS":
        with mock.patch.object(cuda, "PRODUCT_ROWS", 0):
            yield
    elif name == "chosen":
        yield
    else:
        warps, tiles, cluster, keeps = map(int, name.split(","))
        chosen = cuda._tiling

        def forced(rows: int, features: int, size: int, gated: bool, normed: bool, device: int) -> cuda.Tiling | None:
            tiling = cuda.Tiling(rows, size, normed, warps, tiles, cluster, bool(keeps))
            fits = tiling.shared_bytes <= (cuda._shared_memory(device) - 4096) // (16 // warps)
            return tiling if fits else chosen(rows, features, size, gated, normed, device)

        with mock.patch.object(cuda, "_tiling", forced):
            yield


def stack(config: ModelConfig) -> Callable[[int], Callable[[], None]]:
    """For so many rows, a function that runs the products of all layers."""
    hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attended = heads * config.head_dim
    shapes = [
        (attended + 2 * kv_heads * config.head_dim, hidden),
        (hidden, attended),
        (2 * config.intermediate_size, hidden),
        (hidden, config.intermediate_size),
    ]
    layers = [
        [torch.randn(shape, dtype=torch.bfloat16, device="cuda") / shape[1] ** 0.5 for shape in shapes]
        for _ in range(config.num_layers)
    ]
    norm = torch.rand(hidden, dtype=torch.bfloat16, device="cuda")

    def of(rows: int) -> Callable[[], None]:
        total = torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda")
        mixed = torch.randn(rows, attended, dtype=torch.bfloat16, device="cuda")

        def run() -> None:
            for qkv, o, gate_up, down in layers:
                ops.linear(total, qkv, norm=norm, eps=1e-5)
                ops.linear(mixed, o, add_to=total)
                ops.linear(ops.linear(total, gate_up, norm=norm, eps=1e-5, gated=True), down, add_to=total)

        return run

    return of


def microseconds(run: Callable[[], None]) -> float:
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return median(times[3:])


def copied_bytes_per_us() -> float:
    source: Tensor = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / microseconds(lambda: target.copy_(source) and None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64, 128, 256])
    parser.add_argument("--tiling", nargs="+", default=[])
    arguments = parser.parse_args()
    config = ModelConfig.from_folder(arguments.folder)
    with torch.inference_mode():
        of = stack(config)
        for name in ("cuBLAS", "chosen", *arguments.tiling):
            with way(name):
                times = [microseconds(of(rows)) / config.num_layers for rows in arguments.rows]
            print(f"{arguments.folder.name} {name:>11}", *(f"{time:7.1f}" for time in times), flush=True)
    hidden, inner = config.hidden_size, config.intermediate_size
    attended, kept = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    size = 2 * hidden * (2 * attended + 2 * kept + 3 * inner)
    print(f"{arguments.folder.name}       bytes {size / copied_bytes_per_us():7.1f} at the speed of a copy")


if __name__ == "__main__":
    main()
