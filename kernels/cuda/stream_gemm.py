"""Linear layers of tens of rows in bfloat16 or float16 on compute capability 9.0, by TMA and wgmma."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernel_launch import (
    BOX_BYTES,
    VECTOR_BYTES,
    c_name,
    compute_capability,
    kernel,
    num_multiprocessors,
    optional,
    tile_map,
)
from .scaled_gemm import EPILOGUES, Epilogue, epilogue_of, target_of

ROWS = 16, 32, 64  # of x in an instance of stream_gemm
OPERAND_ROWS = 64  # of x that wgmma reads
PARTS = 2  # of a step; mirrors PARTS of stream_gemm.cu
GROUP_ROWS = 32, 48, 64, 80, 96, 112, 128  # of the weight that four warps may have
BARRIER_BYTES = 1024
SHARED_BYTES = 227 * 1024
# Bytes in a microsecond: of the weight for a multiprocessor, of it and x for a multiprocessor, of the weight for all.
WEIGHT_RATE, READ_RATE, MEMORY_RATE = 42e3, 80e3, 4.1e6
SMALL_BYTES = 32 << 20  # stream_gemm takes smaller weights of any shape
STEP_US = 0.3  # for one group to multiply a step, about the same for all tiles
SHARING_US, SPLIT_US = 2.0, 0.4  # to exchange sums between blocks, and within a block


class Tile(NamedTuple):
    """A tile of stream_gemm.

    rows        rows of x
    group_rows  rows of the weight for each group of four warps
    groups      groups with other rows of the weight
    split       groups with the same rows of the weight, and parts of its columns
    sharing     blocks that share the columns
    """

    rows: int
    group_rows: int
    groups: int = 1
    split: int = 1
    sharing: int = 1

    @property
    def weight_rows(self) -> int:
        return self.groups * self.group_rows

    @property
    def stage_bytes(self) -> int:
        return PARTS * (self.rows + self.weight_rows) * BOX_BYTES

    @property
    def extra_bytes(self) -> int:
        """Return the bytes of shared memory that are no stages: sums of other blocks, or rows that x lacks."""
        units = self.group_rows // 16
        parties = self.sharing * self.split
        received = self.split * parties * -(-units // parties) * 2 * self.groups * self.rows * 2 * 16
        lacking = max(0, OPERAND_ROWS - self.rows - self.weight_rows) * BOX_BYTES
        return BARRIER_BYTES + max(received if parties > 1 else 0, lacking)

    @property
    def stages(self) -> int:
        return (SHARED_BYTES - self.extra_bytes) // self.stage_bytes

    def num_blocks(self, weight_rows: int) -> int:
        return -(-weight_rows // self.weight_rows) * self.sharing

    def microseconds(self, weight_rows: int, size: int) -> float:
        """Return an estimate of the time for a weight whose tiles run at the same time."""
        columns = 2 * size / self.sharing  # in bytes
        weight, x = self.weight_rows * columns, self.rows * columns
        steps = -(-columns // (PARTS * BOX_BYTES))
        memory, products = weight_rows * size * 2 / MEMORY_RATE, steps * STEP_US / self.split
        exchange = SHARING_US * (self.sharing > 1) + SPLIT_US * (self.split > 1)
        return max(weight / WEIGHT_RATE, (weight + x) / READ_RATE, memory, products) + exchange


def takes(x: Tensor, weight: Tensor, gated: bool) -> bool:
    """Return whether `stream_linear` takes these tensors, and `is_faster`."""
    half = x.dtype in (torch.bfloat16, torch.float16) and x.dtype == weight.dtype
    aligned = all(t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0 for t in (x, weight))
    fits = 0 < len(x) <= max(ROWS) and x.shape[1] % 8 == 0 and len(weight) % 8 == 0
    faster = fits and is_faster(len(weight), x.shape[1], gated)
    return half and aligned and faster and compute_capability(x.device.index) == (9, 0)


def is_faster(weight_rows: int, size: int, gated: bool) -> bool:
    """Return whether stream_gemm is faster than cuBLAS, by measurements of chains and models.

    cuBLAS has few tiles for long rows, needs one more kernel for SiLU, and starts late, which small weights show.
    """
    return gated or 2 * size >= 3 * weight_rows or 2 * weight_rows * size < SMALL_BYTES


def stream_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, add_to: Tensor | None, out: Tensor | None
) -> Tensor | None:
    """Do `linear` without a norm, or return None if no tile suits the weight."""
    tile = fastest_tile(len(x), len(weight), x.shape[1], num_multiprocessors(x.device.index))
    if tile is None:
        return None
    target = target_of(x, len(weight), gated, add_to, out)
    launch_stream_gemm(target, x, weight, bias, epilogue_of(gated, add_to), tile)
    return target


@functools.lru_cache(maxsize=4096)
def fastest_tile(rows: int, weight_rows: int, size: int, multiprocessors: int) -> Tile | None:
    """Return the fastest tile by estimate, of those that all run at once; None if there is none."""
    few = next(n for n in ROWS if rows <= n)
    at_once = {1: multiprocessors, 2: multiprocessors // 2 * 2, 4: multiprocessors * 10 // 11}  # clusters leave gaps
    tiles = [
        Tile(few, group_rows, groups, split, sharing)
        for group_rows, (groups, split), sharing in itertools.product(GROUP_ROWS, ((1, 1), (1, 2), (2, 1)), at_once)
        if groups == 1 or (sharing == 1 and group_rows >= 96)
    ]
    fitting = [tile for tile in tiles if tile.num_blocks(weight_rows) <= at_once[tile.sharing]]
    return min(fitting, key=lambda tile: tile.microseconds(weight_rows, size), default=None)


def launch_stream_gemm(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue, tile: Tile
) -> None:
    """Write the products of x [T, D] to out [T, F], or add them."""
    rows, features = out.shape
    launch = kernel(
        "stream_gemm.cu",
        f"stream_gemm<{c_name(x)}, {tile.rows}, {tile.group_rows}, {tile.groups}, {tile.split}, {tile.stages}>",
        shared_bytes=tile.stages * tile.stage_bytes + tile.extra_bytes,
        early=True,
        cluster=tile.sharing,
        architecture="sm_90a",
    )
    maps = tile_map(x, tile.rows), tile_map(weight, tile.group_rows // 2)
    sizes = map(np.int32, (rows, features, x.shape[1], EPILOGUES.index(epilogue), tile.sharing))
    grid = tile.num_blocks(len(weight)), 1
    launch(grid, 128 * tile.groups * tile.split + 32, out, *maps, optional(bias), *sizes)
