"""Linear layers and experts: a skinny GEMM for up to 8 rows, cuBLAS for more, and grouped GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import ClampedSwiGLU, ExpertMatrix, FP8Weight, Matrix, MXFP4Weight
from . import scaled_gemm
from .elementwise import rms_norm, silu_and_mul
from .kernel_launch import (
    MAX_THREADS,
    NULL,
    VECTOR_BYTES,
    c_name,
    kernel,
    num_multiprocessors,
    num_threads,
    optional,
    vector_width,
)
from .launch_parameters import Argument

MAX_SKINNY_ROWS = 8  # rows of x; mirrors ROWS of skinny_gemm.cu
MAX_STAGED_BYTES = 100 * 1024  # the most that x takes of shared memory: two blocks share 227 KiB
NO_SCALES = NULL, *map(np.int32, (0, 0, 0, 0))
GROUP_THREADS = 1024  # threads of the one block that groups pairs by expert
# Tile shapes of the grouped GEMM by their rows: warps down and across, 16 x 16 tiles down and across a warp, stages.
TILE_SHAPES = {16: (1, 4, 1, 1, 6), 64: (1, 4, 4, 2, 3), 128: (2, 4, 4, 2, 3)}
# Mean rows of an expert up to which skinny_experts is faster than the grouped GEMM: of MXFP4, and of 16 bits.
MAX_FEW_ROWS = {True: 16, False: 1}
SKINNY_WARPS = 4  # WARPS of skinny_experts.cu
SKINNY_DEPTHS = {1: 3, 2: 4, 4: 3}  # chunks that a lane loads ahead, by the tile's rows / 8
SKINNY_BLOCKS = 4.4  # of skinny_experts for a multiprocessor, which runs 4 at once; a tenth more end soon after
MAX_UNGROUPED_PAIRS = 96  # up to so many, blocks of skinny_experts find their rows themselves
MXFP4_SHAPES = {16: (1, 4, 1, 1, 12), 64: (1, 4, 4, 2, 4), 128: (2, 4, 4, 2, 4)}
FP8_SHAPES = {16: (1, 4, 1, 1, 8), 64: (1, 4, 4, 2, 4), 128: (2, 4, 4, 2, 4)}

Gate = Literal["PLAIN", "SILU", "CLAMPED"]  # the names of Gate in experts.cu
Epilogue = Literal["STORE", "ADD", "SILU"]  # the names of Epilogue in skinny_gemm.cu


def linear(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    skinny = _is_skinny(x, weight) and not batch_invariant
    if isinstance(weight, FP8Weight) and not skinny:
        if len(x) and scaled_gemm.takes(x, weight):
            return scaled_gemm.scaled_linear(x, weight, bias, norm, eps, gated, add_to, out, batch_invariant)
        if not _can_widen(x, weight):
            weight = weight.dequantized(x.dtype)
    if norm is not None and not (skinny and _can_fuse_norm(x, norm, isinstance(weight, FP8Weight))):
        x, norm = rms_norm(x, norm, eps), None
    if skinny:
        target = add_to if out is None else out
        if target is None:
            target = x.new_empty(len(x), weight.shape[0] // 2 if gated else weight.shape[0])
        epilogue: Epilogue = "SILU" if gated else "STORE" if add_to is None else "ADD"
        _skinny_gemm(target, x, weight, norm, bias, eps, epilogue)
        return target
    if batch_invariant or isinstance(weight, FP8Weight):
        product = _batch_invariant_linear(x.contiguous(), weight, bias, gated, out)
        return product if add_to is None else add_to.add_(product)
    if add_to is not None:
        add_to.addmm_(x, weight.t())
        return add_to if bias is None else add_to.add_(bias)
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    product = F.linear(x, weight, bias)
    return silu_and_mul(product) if gated else product


def _batch_invariant_linear(x: Tensor, weight: Matrix, bias: Tensor | None, gated: bool, out: Tensor | None) -> Tensor:
    """Multiply as one expert that has all rows: all tiles sum in one order."""
    if out is None:
        out = x.new_empty(len(x), weight.shape[0] // 2 if gated else weight.shape[0])
    if out.numel():
        rows = _tile_rows(len(x))
        tiles = ExpertTiles(None, None, rows, -(-len(x) // rows))
        expert = weight.expert(None) if isinstance(weight, FP8Weight) else weight[None]
        _multiply_tiles(out, x, expert, bias, "SILU" if gated else "PLAIN", None, tiles)
    return out


def _can_widen(x: Tensor, weight: FP8Weight) -> bool:
    """Return whether grouped_gemm reads this weight in FP8."""
    vectors = weight.shape[-1] % VECTOR_BYTES == 0 and weight.first % VECTOR_BYTES == 0 and weight.columns % 64 == 0
    aligned = weight.data.is_contiguous() and weight.data.data_ptr() % VECTOR_BYTES == 0
    return vectors and aligned and x.dtype in (torch.bfloat16, torch.float16)


def _is_skinny(x: Tensor, weight: Matrix) -> bool:
    """Return whether skinny_gemm takes these tensors."""
    if not 0 < x.shape[0] <= MAX_SKINNY_ROWS:
        return False
    data, step = (weight.data, 16) if isinstance(weight, FP8Weight) else (weight, 8)
    contiguous = x.shape[1] % step == 0 and x.is_contiguous() and data.is_contiguous()
    aligned = x.data_ptr() % VECTOR_BYTES == 0 and data.data_ptr() % VECTOR_BYTES == 0
    blocks = not isinstance(weight, FP8Weight) or (weight.columns % 128 == 0 and weight.first % 16 == 0)
    return x.dtype in (torch.bfloat16, torch.float16) and contiguous and aligned and blocks


def _can_fuse_norm(x: Tensor, norm: Tensor, scaled: bool) -> bool:
    """Return whether the GEMM can apply the norm. In float16 an unscaled row times the norm's weight may overflow."""
    staged = _staged_bytes(x, scaled) <= MAX_STAGED_BYTES
    return x.dtype == torch.bfloat16 and staged and norm.data_ptr() % VECTOR_BYTES == 0


def _staged_bytes(x: Tensor, scaled: bool = False) -> int:
    """Return how many bytes of shared memory x takes; see `stride` in skinny_gemm.cu. Of FP8, with a norm's weight."""
    chunk, padding = (128, 8) if scaled else (64, 32)
    return (len(x) + scaled) * (-(-x.shape[1] // chunk) * chunk + padding) * x.element_size()


def _skinny_gemm(
    out: Tensor, x: Tensor, weight: Matrix, norm: Tensor | None, bias: Tensor | None, eps: float, epilogue: Epilogue
) -> None:
    (rows, size), features = x.shape, out.shape[1]
    tiles, multiprocessors = -(-features // (8 if epilogue == "SILU" else 16)), num_multiprocessors(x.device.index)
    shared_bytes = _staged_bytes(x, isinstance(weight, FP8Weight))
    staged = shared_bytes <= MAX_STAGED_BYTES
    warps, depth = _skinny_shape(tiles, multiprocessors, size, staged, isinstance(weight, FP8Weight))
    data, scales = (weight.data, _scale_arguments(weight)) if isinstance(weight, FP8Weight) else (weight, NO_SCALES)
    name = f"skinny_gemm<{c_name(x)}, {c_name(data)}, {warps}, {depth}, {str(staged).lower()}, {epilogue}>"
    launch = kernel("skinny_gemm.cu", name, shared_bytes=shared_bytes if staged else 0, early=True)
    sizes = np.float32(eps), np.int32(rows), np.int32(features), np.int32(size)
    grid = min(tiles, multiprocessors * (16 // warps)), 1
    launch(grid, 32 * warps, out, x, data, optional(norm), optional(bias), *sizes, *scales)


def _skinny_shape(tiles: int, multiprocessors: int, size: int, staged: bool, scaled: bool) -> tuple[int, int]:
    """Return the warps of a block of skinny_gemm, and the chunks that a warp loads ahead."""
    # With few tiles, all warps of a multiprocessor share one. A short row has few chunks to prefetch, and an x that is
    # not in shared memory leaves few registers for them. Of FP8, 16 warps share one conversion of x.
    if scaled:
        return (16 if staged else 8), 2
    warps = 16 if tiles <= multiprocessors or not staged else 8
    return warps, 2 if not staged else max(2, min(4, -(-size // (64 * warps))))


def _scale_arguments(weight: FP8Weight) -> tuple[Argument, ...]:
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
    if isinstance(gate_up, FP8Weight) and not _can_widen(x, gate_up):
        gate_up = gate_up.dequantized(x.dtype)
    if isinstance(down, FP8Weight) and not _can_widen(x, down):
        down = down.dequantized(x.dtype)
    (tokens, size), pairs, num_experts = x.shape, expert_ids.numel(), gate_up.shape[0]
    if pairs == 0:
        return torch.zeros_like(x) if add_to is None else add_to
    x, expert_ids, scores = x.contiguous(), expert_ids.contiguous(), scores.contiguous()
    hidden, expert_out = x.new_empty(pairs, down.shape[2]), x.new_empty(pairs, size)
    # Rows of pairs without an expert are neither written nor read.
    gate: Gate = "SILU" if swiglu is None else "CLAMPED"
    if x.dtype == torch.float32:
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        _float32_gemm(hidden, x, gate_up, gate_up_bias, gate, swiglu, expert_ids)
        _float32_gemm(expert_out, hidden, down, down_bias, "PLAIN", None, expert_ids)
    else:
        max_few = 0 if batch_invariant else _max_few_rows(gate_up, down)
        multiply = _multiply_by_expert(expert_ids, num_experts, max_few)
        multiply(hidden, x, gate_up, gate_up_bias, gate, swiglu)
        multiply(expert_out, hidden, down, down_bias, "PLAIN", None)
    out = x.new_empty(tokens, size) if add_to is None else add_to
    v = vector_width(size, expert_out, out)
    threads = num_threads(size // v)
    launch = kernel("experts.cu", f"weighted_sum<{c_name(x)}, {v}>", early=True)
    shape = np.int32(expert_ids.shape[1]), np.int32(num_experts), np.int32(size)
    grid = tokens, -(-size // (v * threads))
    launch(grid, threads, out, expert_out, scores, expert_ids, optional(add_to), *shape)
    return out


def _max_few_rows(*matrices: ExpertMatrix) -> int:
    """Return the mean rows of an expert up to which skinny_experts multiplies these weights; 0 for never."""
    if any(isinstance(matrix, FP8Weight) for matrix in matrices):
        return 0
    return MAX_FEW_ROWS[isinstance(matrices[0], MXFP4Weight)]


def _multiply_by_expert(expert_ids: Tensor, num_experts: int, max_few: int) -> Callable[..., None]:
    """Group the pairs by expert; return the function that multiplies them, as `_multiply_tiles` without tiles.

    max_few  mean rows of an expert up to which this is skinny_experts
    """
    pairs = expert_ids.numel()
    mean = -(-pairs // num_experts)
    if mean > max_few:
        return functools.partial(_multiply_tiles, tiles=_group_pairs(expert_ids, num_experts, _tile_rows(mean)))
    if pairs <= MAX_UNGROUPED_PAIRS:
        tiles = ExpertTiles(None, None, 8, pairs)
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


def _tile_rows(rows: int) -> int:
    # Few rows are bound by bandwidth; many by arithmetic, which larger tiles feed better. The bounds are not measured.
    return 16 if rows <= 16 else 64 if rows <= 256 else 128


def _multiply_tiles(
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
        return WeightFormat("fp8", FP8_SHAPES, 64, (weights.data, *_scale_arguments(weights)))
    return WeightFormat(c_name(x), TILE_SHAPES, 128, (weights, *NO_SCALES))


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
    """Do `_multiply_tiles` for tiles of 8 or 16 rows."""
    assert not isinstance(weights, FP8Weight)
    matrices = (weights.data, weights.scales) if isinstance(weights, MXFP4Weight) else (weights, NULL)
    columns, eights = out.shape[1], tiles.rows // 8
    units = tiles.num_tiles * -(-columns // (16 if gate == "PLAIN" else 8))  # what a warp, or several, multiplies
    split = _skinny_split(units, out.device.index)
    instance = c_name(x), _format_of(x, weights).name, eights, SKINNY_DEPTHS[eights], split, gate
    launch = kernel("skinny_experts.cu", f"skinny_experts<{', '.join(map(str, instance))}>", early=True)
    grid = tiles.num_tiles * -(-columns * split // (SKINNY_WARPS * (16 if gate == "PLAIN" else 8))), 1
    groups = optional(tiles.tiles), optional(tiles.order), expert_ids
    sizes = map(np.int32, (len(out), weights.shape[0], len(out) // len(x), x.shape[1], columns))
    launch(grid, 32 * SKINNY_WARPS, out, x, *matrices, optional(bias), *groups, *sizes, *_parameters(swiglu))


def _skinny_split(units: int, device: int) -> int:
    """Return how many warps share the columns of a unit: as many as run at once, if all units do."""
    warps = int(SKINNY_BLOCKS * SKINNY_WARPS * num_multiprocessors(device))
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
