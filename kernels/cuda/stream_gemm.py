"""Linear layers of tens of rows in bfloat16 or float16 on compute capability 9.0, by TMA and wgmma."""

from __future__ import annotations

import functools

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
    part_map,
)
from .scaled_gemm import EPILOGUES, Epilogue, epilogue_of, target_of
from .weight_tile import BARRIER_BYTES, SHARED_BYTES, WeightTile

ROWS = 16, 32, 64  # of x in an instance of stream_gemm
COLUMNS = 64  # of a part of a step
GROUP_ROWS = 32, 48, 64, 80, 96, 112, 128  # of the weight that four warps may have
MAX_STAGE_BYTES = 32 * 1024  # of two parts; a larger stage has one
# Bytes in a microsecond: of the weight for a multiprocessor, of it and x for a multiprocessor, of the weight for all.
WEIGHT_RATE, READ_RATE, MEMORY_RATE = 52e3, 165e3, 4e6
PART_US = 0.024  # for each part that a block multiplies, whatever its size
SHARING_US, SUM_RATE = 0.13, 10e3  # to exchange sums between blocks, in bytes of a block's sums in a microsecond


class Tile(WeightTile):
    """A tile of stream_gemm."""

    @property
    def parts(self) -> int:
        """Return the parts of COLUMNS columns that are copied and multiplied as one step."""
        return 2 if 2 * self.part_bytes < MAX_STAGE_BYTES else 1

    @property
    def part_bytes(self) -> int:
        return (self.rows + self.weight_rows) * BOX_BYTES

    @property
    def extra_bytes(self) -> int:
        """Return the bytes of shared memory that are no stages: barriers, and sums of other blocks."""
        units = -(-self.group_rows // 16 // self.sharing)
        received = self.sharing * self.groups * self.rows * (2 * units + 1) * 8 * 4
        return BARRIER_BYTES + (received if self.sharing > 1 else 0)

    @property
    def stages(self) -> int:
        return (SHARED_BYTES - self.extra_bytes) // (self.parts * self.part_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.parts * self.part_bytes + self.extra_bytes

    def microseconds(self, weight_rows: int, size: int) -> float:
        """Return an estimate of the time for a weight whose tiles run at the same time."""
        columns = size / self.sharing
        weight, x, parts = self.weight_rows * columns * 2, self.rows * columns * 2, columns / COLUMNS
        copies = max(weight / WEIGHT_RATE, (weight + x) / READ_RATE, weight_rows * size * 2 / MEMORY_RATE)
        exchange = SHARING_US + self.rows * self.weight_rows * 4 / SUM_RATE if self.sharing > 1 else 0.0
        return copies + parts * PART_US + exchange


def takes(x: Tensor, weight: Tensor, gated: bool, *others: Tensor) -> bool:
    """Return whether `stream_linear` takes these tensors. Weights that need more tiles than multiprocessors it refuses.

    others  bias and result, if there are any
    """
    half = x.dtype in (torch.bfloat16, torch.float16) and all(t.dtype == x.dtype for t in (weight, *others))
    aligned = all(t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0 for t in (x, weight, *others))
    fits = 0 < len(x) <= max(ROWS) and x.shape[1] % COLUMNS == 0 and len(weight) % (16 if gated else 8) == 0
    if not (half and aligned and fits and compute_capability(x.device.index) == (9, 0)):
        return False
    return fastest_tile(len(x), len(weight), x.shape[1], num_multiprocessors(x.device.index)) is not None


def stream_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, add_to: Tensor | None, out: Tensor | None
) -> Tensor:
    """Do `linear` without a norm for tensors that `takes` accepts."""
    tile = fastest_tile(len(x), len(weight), x.shape[1], num_multiprocessors(x.device.index))
    assert tile is not None
    target = target_of(x, len(weight), gated, add_to, out)
    launch_stream_gemm(target, x, weight, bias, epilogue_of(gated, add_to), tile)
    return target


@functools.lru_cache(maxsize=4096)
def fastest_tile(rows: int, weight_rows: int, size: int, multiprocessors: int) -> Tile | None:
    """Return the fastest tile by estimate, of those that all run at once; None if there is none."""
    few = next(n for n in ROWS if rows <= n)
    at_once = {1: multiprocessors, 2: multiprocessors // 2 * 2, 4: multiprocessors * 10 // 11}  # clusters leave gaps
    tiles = [
        *(Tile(few, group_rows, 1, sharing) for group_rows in GROUP_ROWS for sharing in at_once),
        *(Tile(few, group_rows, groups) for groups in (2, 3) for group_rows in GROUP_ROWS[-3:]),
    ]
    fitting = [tile for tile in tiles if tile.num_blocks(weight_rows) <= at_once[tile.sharing]]
    return min(fitting, key=lambda tile: tile.microseconds(weight_rows, size), default=None)


def launch_stream_gemm(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue, tile: Tile
) -> None:
    """Write the products of x [T, D] to out [T, F], or add them. D is a multiple of COLUMNS."""
    rows, features = out.shape
    numbers = tile.rows, tile.group_rows, tile.groups, tile.sharing, tile.parts, tile.stages
    launch = kernel(
        "stream_gemm.cu",
        f"stream_gemm<{c_name(x)}, {', '.join(map(str, numbers))}>",
        shared_bytes=tile.shared_bytes,
        early=True,
        cluster=tile.sharing,
        architecture="sm_90a",
    )
    halves = 2 if epilogue == "SILU" else 1
    maps = part_map(x, tile.rows, 1, tile.parts), part_map(weight, tile.group_rows, halves, tile.parts)
    sizes = map(np.int32, (rows, features, x.shape[1], EPILOGUES.index(epilogue)))
    launch((tile.num_blocks(len(weight)), 1), 128 * tile.groups + 64, out, *maps, optional(bias), *sizes)
