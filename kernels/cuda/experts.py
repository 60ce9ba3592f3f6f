"""Mixture of experts: group the pairs (token, choice) by expert, two grouped GEMMs, and a weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .kernel_launch import MAX_THREADS, c_name, kernel, num_threads, optional, vector_width

GROUP_THREADS = 1024  # of the one block that groups pairs by expert
# Tile shapes of the grouped GEMM by their rows: warps down and across, 16 x 16 tiles down and across a warp, stages.
TILE_SHAPES = {16: (1, 4, 1, 1, 6), 64: (1, 4, 4, 2, 3), 128: (2, 4, 4, 2, 3)}

Gemm = Callable[[Tensor, Tensor, Tensor], None]  # writes out from x and weights, with SiLU if gated


def experts(x: Tensor, expert_ids: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (tokens, size), pairs, num_experts = x.shape, expert_ids.numel(), len(gate_up)
    if pairs == 0:
        return torch.zeros_like(x)
    x, expert_ids, scores = x.contiguous(), expert_ids.contiguous(), scores.contiguous()
    gemm = _float32_gemm(expert_ids) if x.dtype == torch.float32 else _grouped_gemm(expert_ids, num_experts)
    hidden = x.new_empty(pairs, down.shape[2])
    gemm(hidden, x, gate_up)
    expert_out = x.new_empty(pairs, size)  # rows of pairs without an expert are neither written nor read, as in hidden
    gemm(expert_out, hidden, down)
    out = x.new_empty(tokens, size)
    v = vector_width(size, expert_out, out)
    threads = num_threads(size // v)
    launch = kernel("experts.cu", f"weighted_sum<{c_name(x)}, {v}>")
    shape = np.int32(expert_ids.shape[1]), np.int32(num_experts), np.int32(size)
    launch((tokens, -(-size // (v * threads))), threads, out, expert_out, scores, expert_ids, *shape)
    return out


def tiled_gemm(out: Tensor, x: Tensor, weights: Tensor) -> None:
    """Write `x @ weights[0]^T` into `out` with the grouped GEMM: one expert that has all rows.

    weights  [1, F, D], or [1, 2 F, D] for `silu(gate) * up`, which follows from out [T, F]
    """
    rows = _tile_rows(len(x))
    _multiply_tiles(out, x, weights, rows, -(-len(x) // rows), None, None)


def _grouped_gemm(expert_ids: Tensor, num_experts: int) -> Gemm:
    """Group the pairs by expert, and return a GEMM on tensor cores over the groups."""
    pairs = expert_ids.numel()
    rows = _tile_rows(-(-pairs // num_experts))
    in_use = min(num_experts, pairs)
    num_tiles = in_use + (pairs - in_use) // rows  # an upper bound for any routing
    tiles = expert_ids.new_empty(num_tiles, 4, dtype=torch.int32)
    order = expert_ids.new_empty(pairs, dtype=torch.int32)
    group = kernel("experts.cu", f"group_pairs<{rows}>", shared_bytes=8 * (num_experts + 3))
    shape = np.int32(pairs), np.int32(num_experts), np.int32(num_tiles)
    group((1, 1), GROUP_THREADS, tiles, order, expert_ids, *shape)

    def gemm(out: Tensor, x: Tensor, weights: Tensor) -> None:
        _multiply_tiles(out, x, weights, rows, num_tiles, tiles, order)

    return gemm


def _tile_rows(rows: int) -> int:
    """Return the rows of a tile for this many rows per expert.

    Few rows are bound by bandwidth; many by arithmetic, which larger tiles feed better. The bounds are not measured.
    """
    return 16 if rows <= 16 else 64 if rows <= 256 else 128


def _multiply_tiles(
    out: Tensor, x: Tensor, weights: Tensor, rows: int, num_tiles: int, tiles: Tensor | None, order: Tensor | None
) -> None:
    gated, columns = _is_gated(out, weights), out.shape[1]
    warps_down, warps_across, m, n, stages = TILE_SHAPES[rows]
    weight_rows = 16 * n * warps_across
    name = f"{c_name(x)}, {warps_down}, {warps_across}, {m}, {n}, {stages}, {str(gated).lower()}"
    shared_bytes = stages * (rows + weight_rows) * 128
    launch = kernel("experts.cu", f"grouped_gemm<{name}>", shared_bytes=shared_bytes)
    parts = -(-columns // (weight_rows // 2 if gated else weight_rows))
    grid, threads = (num_tiles * parts, 1), 32 * warps_down * warps_across
    sizes = len(out) // len(x), len(out), x.shape[1], columns
    launch(grid, threads, out, x, weights, optional(tiles), optional(order), *map(np.int32, sizes))


def _float32_gemm(expert_ids: Tensor) -> Gemm:
    """Return a GEMM in float32 that multiplies one pair at a time."""

    def gemm(out: Tensor, x: Tensor, weights: Tensor) -> None:
        launch = kernel("experts.cu", f"float32_gemm<{str(_is_gated(out, weights)).lower()}>")
        sizes = len(out), len(out) // len(x), len(weights), x.shape[1], out.shape[1]
        launch((-(-out.numel() // 8), 1), MAX_THREADS, out, x, weights, expert_ids, *map(np.int32, sizes))

    return gemm


def _is_gated(out: Tensor, weights: Tensor) -> bool:
    """Return whether the weights have two rows, gate and up, for each column of the output."""
    return weights.shape[1] == 2 * out.shape[1]
