"""Experts of a mixture: GEMMs over the rows of each expert, in few, some or many rows, and the weighted sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import ClampedSwiGLU, ExpertMatrix, FP8Weight, MXFP4Weight
from .kernel_launch import (
    MAX_THREADS,
    NULL,
    VECTOR_BYTES,
    c_name,
    compute_capability,
    kernel,
    num_multiprocessors,
    num_threads,
    optional,
    vector_width,
)
from .launch_parameters import Argument

NO_SCALES = NULL, *map(np.int32, (0, 0, 0, 0))
GROUP_THREADS = 1024  # threads of the one block that groups pairs by expert
# Tile shapes of the grouped GEMM by their rows: warps down and across, 16 x 16 tiles down and across a warp, stages.
TILE_SHAPES = {16: (1, 4, 1, 1, 6), 64: (1, 4, 4, 2, 3), 128: (2, 4, 4, 2, 3)}
# Mean rows of an expert up to which skinny_experts is faster than the grouped GEMM: of MXFP4, and of 16 bits.
MAX_FEW_ROWS = {True: 16, False: 1}
SKINNY_WARPS = 4  # WARPS of skinny_experts.cu
# Rows of x in shared memory of a block of skinny_experts: of tiles that it finds itself, so that six blocks fit on a
# multiprocessor, and of tiles of group_pairs, whose rows are fixed. Rows that need more stay in L1.
MAX_STAGED_BYTES, MAX_TILE_BYTES = 34 * 1024, 100 * 1024
SKINNY_DEPTHS = {1: 3, 2: 4, 4: 3}  # chunks that a lane loads ahead, by the tile's rows / 8
# Blocks of skinny_experts for a multiprocessor, up to which they are divided further: of 16 bits, and of MXFP4.
SKINNY_BLOCKS, MXFP4_BLOCKS = 4.4, {"PLAIN": 11.0, "SILU": 6.0, "CLAMPED": 6.0}
WIDE_SHAPES = {32: (2, 4), 64: (2, 4), 128: (4, 4)}  # of wide_experts, by the rows of a tile: groups, stages
MIN_WIDE_ROWS = 8  # mean rows of an expert from which wide_experts is faster than skinny_experts
MAX_UNGROUPED_PAIRS = 96  # up to so many, blocks of skinny_experts find their rows themselves
# sum_experts does down and the weighted sum in one, for up to so many tokens; it reads an expert once for each.
MAX_SUMMED_TOKENS, MAX_SUMMED_CHOICES = 2, 20
SUM_WARPS, SUM_DEPTH = 10, 3  # most warps of its block, and chunks that a lane loads ahead
MXFP4_SHAPES = {16: (1, 4, 1, 1, 12), 64: (1, 4, 4, 2, 4), 128: (2, 4, 4, 2, 4)}
FP8_SHAPES = {16: (1, 4, 1, 1, 8), 64: (1, 4, 4, 2, 4), 128: (2, 4, 4, 2, 4)}

Gate = Literal["PLAIN", "SILU", "CLAMPED"]  # the names of Gate in experts.cu


def can_widen(x: Tensor, weight: FP8Weight) -> bool:
    """Return whether grouped_gemm reads this weight in FP8."""
    vectors = weight.shape[-1] % VECTOR_BYTES == 0 and weight.first % VECTOR_BYTES == 0 and weight.columns % 64 == 0
    aligned = weight.data.is_contiguous() and weight.data.data_ptr() % VECTOR_BYTES == 0
    return vectors and aligned and x.dtype in (torch.bfloat16, torch.float16)


def scale_arguments(weight: FP8Weight) -> tuple[Argument, ...]:
    shifts = weight.rows.bit_length() - 1, weight.columns.bit_length() - 1
    return weight.scales, *map(np.int32, (*shifts, weight.scales.shape[-1], weight.first))


class ExpertTiles(NamedTuple):
    """The tiles of pairs (token, choice) by expert, as group_pairs of experts.cu writes them; None is one expert."""

    tiles: Tensor | None
    order: Tensor | None
    rows: int  # of a tile
    num_tiles: int


def experts(
    x: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    swiglu: ClampedSwiGLU | None = None,
    add_to: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    if isinstance(gate_up, FP8Weight) and not can_widen(x, gate_up):
        gate_up = gate_up.dequantized(x.dtype)
    if isinstance(down, FP8Weight) and not can_widen(x, down):
        down = down.dequantized(x.dtype)
    pairs, num_experts = expert_ids.numel(), gate_up.shape[0]
    if pairs == 0:
        return torch.zeros_like(x) if add_to is None else add_to
    x, expert_ids, scores = x.contiguous(), expert_ids.contiguous(), scores.contiguous()
    multiply = _multiplication(x, expert_ids, gate_up, down, batch_invariant=batch_invariant)
    # Rows of pairs without an expert are not written, and nothing depends on them.
    hidden = x.new_empty(pairs, down.shape[2])
    multiply(hidden, x, gate_up, gate_up_bias, "SILU" if swiglu is None else "CLAMPED", swiglu)
    out = torch.empty_like(x) if add_to is None else add_to
    if not batch_invariant and _takes_sum(x, expert_ids, gate_up, down):
        _sum_experts(out, hidden, down, down_bias, scores, expert_ids, add_to)
        return out
    expert_out = x.new_empty(pairs, x.shape[1])
    multiply(expert_out, hidden, down, down_bias, "PLAIN", None)
    _weighted_sum(out, expert_out, scores, expert_ids, num_experts, add_to)
    return out


def _multiplication(
    x: Tensor, expert_ids: Tensor, gate_up: ExpertMatrix, down: ExpertMatrix, *, batch_invariant: bool
) -> Callable[..., None]:
    """Return the function that multiplies these weights, as `multiply_tiles` without tiles."""
    num_experts = gate_up.shape[0]
    if x.dtype == torch.float32:
        return functools.partial(_float32_gemm, expert_ids=expert_ids)
    if batch_invariant:
        return _multiply_by_expert(expert_ids, num_experts, 0)
    if _takes_wide(x, gate_up, down, -(-expert_ids.numel() // num_experts)):
        return _multiply_widely(expert_ids, num_experts)
    return _multiply_by_expert(expert_ids, num_experts, _max_few_rows(gate_up, down))


def _weighted_sum(
    out: Tensor, expert_out: Tensor, scores: Tensor, expert_ids: Tensor, num_experts: int, add_to: Tensor | None
) -> None:
    tokens, size = out.shape
    v = vector_width(size, expert_out, out)
    threads = num_threads(size // v)
    launch = kernel("experts.cu", f"weighted_sum<{c_name(out)}, {v}>", early=True)
    shape = np.int32(expert_ids.shape[1]), np.int32(num_experts), np.int32(size)
    grid = tokens, -(-size // (v * threads))
    launch(grid, threads, out, expert_out, scores, expert_ids, optional(add_to), *shape)


def _takes_sum(x: Tensor, expert_ids: Tensor, gate_up: ExpertMatrix, down: ExpertMatrix) -> bool:
    """Return whether sum_experts multiplies these weights: for few tokens, where skinny_experts would."""
    tokens, choices = expert_ids.shape
    few = tokens <= MAX_SUMMED_TOKENS and 1 < choices <= MAX_SUMMED_CHOICES and x.dtype != torch.float32
    fits = _row_bytes(down.shape[2]) * (choices + 1) <= MAX_TILE_BYTES
    return few and fits and -(-tokens * choices // down.shape[0]) <= _max_few_rows(gate_up, down)


def _sum_experts(
    out: Tensor,
    hidden: Tensor,
    down: ExpertMatrix,
    bias: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    add_to: Tensor | None,
) -> None:
    """Multiply the rows of hidden by down, and write their weighted sum; gate and up are the kernel before."""
    assert not isinstance(down, FP8Weight)
    (tokens, choices), (experts, columns, width) = expert_ids.shape, down.shape
    matrices = (down.data, down.scales) if isinstance(down, MXFP4Weight) else (down, NULL)
    twos = -(-choices // 2)  # warps take the rows of two choices together
    split = 1 << (SUM_WARPS // twos).bit_length() - 1
    name = f"sum_experts<{c_name(out)}, {_format_of(out, down).name}, {choices}, {split}, {SUM_DEPTH}>"
    launch = kernel("skinny_experts.cu", name, shared_bytes=2 * twos * _row_bytes(width), early=True)
    sizes = map(np.int32, (experts, width, columns))
    inputs = hidden, *matrices, optional(bias), scores, expert_ids, optional(add_to)
    launch((tokens, columns // 8), 32 * twos * split, out, *inputs, *sizes)


def _max_few_rows(*matrices: ExpertMatrix) -> int:
    """Return the mean rows of an expert up to which skinny_experts multiplies these weights; 0 for never."""
    if any(isinstance(matrix, FP8Weight) for matrix in matrices):
        return 0
    return MAX_FEW_ROWS[isinstance(matrices[0], MXFP4Weight)]


def _takes_wide(x: Tensor, gate_up: ExpertMatrix, down: ExpertMatrix, mean: int) -> bool:
    """Return whether wide_experts multiplies these weights by so many rows of an expert on average."""
    both = isinstance(gate_up, MXFP4Weight) and isinstance(down, MXFP4Weight)
    return both and mean >= MIN_WIDE_ROWS and compute_capability(x.device.index) == (9, 0)


def _multiply_widely(expert_ids: Tensor, num_experts: int) -> Callable[..., None]:
    """Do `_multiply_by_expert` with wide_experts."""
    mean = -(-expert_ids.numel() // num_experts)
    rows = 32 if mean <= 24 else 64 if mean <= 80 else 128
    return functools.partial(_wide_experts, tiles=_group_pairs(expert_ids, num_experts, rows))


def _multiply_by_expert(expert_ids: Tensor, num_experts: int, max_few: int) -> Callable[..., None]:
    """Group the pairs by expert; return the function that multiplies them, as `multiply_tiles` without tiles.

    max_few  mean rows of an expert up to which this is skinny_experts
    """
    pairs = expert_ids.numel()
    mean = -(-pairs // num_experts)
    if mean > max_few:
        return functools.partial(multiply_tiles, tiles=_group_pairs(expert_ids, num_experts, tile_rows(mean)))
    if pairs <= MAX_UNGROUPED_PAIRS:
        tiles = ExpertTiles(None, None, min(8, len(expert_ids)), pairs)  # each token has an expert once
    else:
        tiles = _group_pairs(expert_ids, num_experts, 8 if mean <= 4 else 16 if mean <= 8 else 32)
    return functools.partial(_skinny_experts, tiles=tiles, expert_ids=expert_ids)


def _group_pairs(expert_ids: Tensor, num_experts: int, rows: int) -> ExpertTiles:
    """Group the pairs by expert, in tiles of up to so many rows."""
    pairs = expert_ids.numel()
    in_use = min(num_experts, pairs)
    num_tiles = in_use + (pairs - in_use) // rows  # an upper bound for any routing
    tiles = expert_ids.new_empty(num_tiles, 4, dtype=torch.int32)
    order = expert_ids.new_empty(pairs, dtype=torch.int32)
    group = kernel("experts.cu", f"group_pairs<{rows}>", shared_bytes=8 * (num_experts + 3), early=True)
    shape = np.int32(pairs), np.int32(num_experts), np.int32(num_tiles)
    group((1, 1), GROUP_THREADS, tiles, order, expert_ids, *shape)
    return ExpertTiles(tiles, order, rows, num_tiles)


def tile_rows(rows: int) -> int:
    # Few rows are bound by bandwidth; many by arithmetic, which larger tiles feed better. The bounds are not measured.
    return 16 if rows <= 16 else 64 if rows <= 256 else 128


def multiply_tiles(
    out: Tensor,
    x: Tensor,
    weights: ExpertMatrix,
    bias: Tensor | None,
    gate: Gate,
    swiglu: ClampedSwiGLU | None,
    tiles: ExpertTiles,
) -> None:
    """Write out [pairs, F] from the rows of x; several pairs in a row share one if x has fewer."""
    columns, form = out.shape[1], _format_of(x, weights)
    warps_down, warps_across, m, n, stages = form.shapes[tiles.rows]
    weight_rows = 16 * n * warps_across
    name = f"grouped_gemm<{c_name(x)}, {form.name}, {warps_down}, {warps_across}, {m}, {n}, {stages}, {gate}>"
    shared_bytes = stages * (tiles.rows * 128 + weight_rows * form.stage_bytes)
    launch = kernel("experts.cu", name, shared_bytes=shared_bytes, early=True)
    parts = -(-columns // (weight_rows if gate == "PLAIN" else weight_rows // 2))
    grid, threads = (tiles.num_tiles * parts, 1), 32 * warps_down * warps_across
    sizes = map(np.int32, (len(out) // len(x), len(out), x.shape[1], columns))
    groups = optional(tiles.tiles), optional(tiles.order)
    launch(grid, threads, out, x, *form.matrices, optional(bias), *groups, *sizes, *_parameters(swiglu))


class WeightFormat(NamedTuple):
    """The format in which grouped_gemm reads weights."""

    name: str  # of the type in experts.cu
    shapes: dict[int, tuple[int, int, int, int, int]]  # of tiles, by their rows
    stage_bytes: int  # of a row of the weights in a stage
    matrices: tuple[Argument, ...]  # the weights and their scales


def _format_of(x: Tensor, weights: ExpertMatrix) -> WeightFormat:
    if isinstance(weights, MXFP4Weight):
        return WeightFormat("mxfp4", MXFP4_SHAPES, 32, (weights.data, weights.scales, *NO_SCALES[1:]))
    if isinstance(weights, FP8Weight):
        return WeightFormat("fp8", FP8_SHAPES, 64, (weights.data, *scale_arguments(weights)))
    return WeightFormat(c_name(x), TILE_SHAPES, 128, (weights, *NO_SCALES))


def _row_bytes(width: int) -> int:
    """Return the shared memory of a row in StagedRows of skinny_experts.cu."""
    return -(-width // 128) * 256 + 64


def _skinny_experts(
    out: Tensor,
    x: Tensor,
    weights: ExpertMatrix,
    bias: Tensor | None,
    gate: Gate,
    swiglu: ClampedSwiGLU | None,
    tiles: ExpertTiles,
    expert_ids: Tensor,
) -> None:
    """Do `multiply_tiles` for tiles of up to 32 rows."""
    assert not isinstance(weights, FP8Weight)
    is_mxfp4 = isinstance(weights, MXFP4Weight)
    matrices = (weights.data, weights.scales) if isinstance(weights, MXFP4Weight) else (weights, NULL)
    columns, rows, row_bytes = out.shape[1], tiles.rows, _row_bytes(x.shape[1])
    if tiles.tiles is None:
        rows = max(1, min(rows, MAX_STAGED_BYTES // row_bytes))
    eights = -(-rows // 8)
    if eights == 1 and rows * row_bytes > MAX_TILE_BYTES:
        eights = 2  # an instance that reads x from L1
    units = tiles.num_tiles * -(-columns // (16 if gate == "PLAIN" else 8))  # what a warp, or several, multiplies
    split = _skinny_split(units, MXFP4_BLOCKS[gate] if is_mxfp4 else SKINNY_BLOCKS, out.device.index)
    instance = c_name(x), _format_of(x, weights).name, eights, SKINNY_DEPTHS[eights], split, gate
    name = f"skinny_experts<{', '.join(map(str, instance))}>"
    shared_bytes = rows * row_bytes if eights == 1 else 0
    launch = kernel("skinny_experts.cu", name, shared_bytes=shared_bytes, early=True)
    grid = -(-columns * split // (SKINNY_WARPS * (16 if gate == "PLAIN" else 8))), tiles.num_tiles
    groups = optional(tiles.tiles), optional(tiles.order), expert_ids
    sizes = map(np.int32, (len(out), weights.shape[0], rows, len(out) // len(x), x.shape[1], columns))
    launch(grid, 32 * SKINNY_WARPS, out, x, *matrices, optional(bias), *groups, *sizes, *_parameters(swiglu))


def _wide_experts(
    out: Tensor,
    x: Tensor,
    weights: MXFP4Weight,
    bias: Tensor | None,
    gate: Gate,
    swiglu: ClampedSwiGLU | None,
    tiles: ExpertTiles,
) -> None:
    """Do `multiply_tiles` for weights in MXFP4 with wgmma."""
    columns, (groups, stages) = out.shape[1], WIDE_SHAPES[tiles.rows]
    weight_rows = 64 * groups
    launch = kernel(
        "wide_experts.cu",
        f"wide_experts<{groups}, {tiles.rows}, {stages}, {gate}>",
        shared_bytes=stages * (tiles.rows * 256 + weight_rows * 64),
        early=True,
        architecture="sm_90a",
    )
    parts = -(-columns // (weight_rows if gate == "PLAIN" else weight_rows // 2))
    sizes = map(np.int32, (len(out) // len(x), x.shape[1], columns))
    assert tiles.tiles is not None
    assert tiles.order is not None
    grid, threads = (tiles.num_tiles * parts, 1), 128 * groups
    launch(
        grid,
        threads,
        out,
        x,
        weights.data,
        weights.scales,
        optional(bias),
        tiles.tiles,
        tiles.order,
        *sizes,
        *_parameters(swiglu),
    )


def _skinny_split(units: int, blocks: float, device: int) -> int:
    """Return how many warps share the columns of a unit, for no more than so many blocks of a multiprocessor."""
    warps = int(blocks * SKINNY_WARPS * num_multiprocessors(device))
    return next((split for split in (4, 2) if units * split <= warps), 1)


def _float32_gemm(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    gate: Gate,
    swiglu: ClampedSwiGLU | None,
    expert_ids: Tensor,
) -> None:
    launch = kernel("experts.cu", f"float32_gemm<{gate}>")
    sizes = map(np.int32, (len(out), len(out) // len(x), len(weights), x.shape[1], out.shape[1]))
    grid = -(-out.numel() // 8), 1
    launch(grid, MAX_THREADS, out, x, weights, optional(bias), expert_ids, *sizes, *_parameters(swiglu))


def _parameters(swiglu: ClampedSwiGLU | None) -> tuple[np.float32, np.float32]:
    alpha, limit = swiglu or ClampedSwiGLU(0.0, 0.0)
    return np.float32(alpha), np.float32(limit)
