"""Linear layers of 33 to 128 rows with FP8 weights in blocks of scales, on compute capability 9.0, by TMA and wgmma."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..arguments import FP8Rows, FP8Weight
from .kernel_launch import BOX_BYTES, C_NAMES, kernel, optional, tile_map
from .weight_tile import BARRIER_BYTES, SHARED_BYTES, WeightTile

BLOCK = 128  # rows and columns of a scale of the weight, and columns of one of x
GROUP_THREADS, GROUP_ROWS = 128, 64  # of x for each group of four warps
HALF_OF_SHARED_BYTES = 113 * 1024
FEW_ROWS, MANY_ROWS = 32, 128  # of x: up to few fp8_gemm is faster, beyond many cuBLAS
LARGE_BYTES = 64 << 20  # of a weight, for which reading x for each 32 rows of it takes too long
MIN_COLUMNS = 1280  # of a block of a cluster


class FP8Tile(WeightTile):
    """A tile of stream_fp8, with a multiple of 64 rows of x."""

    @property
    def consumers(self) -> int:
        return GROUP_THREADS * self.groups * self.rows // GROUP_ROWS

    @property
    def is_alone(self) -> bool:
        """Return whether the block fills a multiprocessor; else two do. Mirrors ALONE of stream_fp8.cu."""
        return self.consumers > GROUP_THREADS

    @property
    def threads(self) -> int:
        return self.consumers + (GROUP_THREADS if self.is_alone else 32)

    @property
    def stage_bytes(self) -> int:
        parts = 2 if self.weight_rows <= 64 and self.rows == 64 else 1  # mirrors PARTS of stream_fp8.cu
        return parts * ((self.rows + self.weight_rows) * BOX_BYTES + 4 * self.rows)

    @property
    def extra_bytes(self) -> int:
        """Return the bytes of shared memory that are no stages: barriers, and sums of other blocks or peaks of rows."""
        units = -(-self.group_rows // 16 // self.sharing)
        received = self.sharing * units * 2 * self.consumers * 16 if self.sharing > 1 else 0
        return BARRIER_BYTES + max(received, self.groups * self.rows * 4)

    @property
    def stages(self) -> int:
        most = SHARED_BYTES if self.is_alone else HALF_OF_SHARED_BYTES
        return (most - self.extra_bytes) // self.stage_bytes


def takes(weight: FP8Weight) -> bool:
    """Return whether the weight has whole blocks of scales."""
    return weight.rows == weight.columns == BLOCK and weight.first == 0 and weight.shape[1] % BLOCK == 0


@functools.lru_cache(maxsize=4096)
def fastest_fp8_tile(rows: int, weight_rows: int, size: int, gated: bool, multiprocessors: int) -> FP8Tile | None:
    """Return a tile that is faster than fp8_gemm or cuBLAS, by measurements of chains; None if there is none."""
    if not FEW_ROWS < rows <= MANY_ROWS:
        return None
    if rows > GROUP_ROWS:  # cuBLAS has few tiles for long rows alone
        tiles = FP8Tile(MANY_ROWS, 112, 1, 3), FP8Tile(MANY_ROWS, 80, 1, 2)
        return _fullest(tiles, weight_rows, multiprocessors) if 2 * size >= 5 * weight_rows else None
    places = 2 * multiprocessors  # of blocks of fp8_gemm, which has a tile for each 128 rows
    tiles_of_fp8_gemm = -(-weight_rows // BLOCK)
    if gated:
        fills = 3 * places // 4 <= tiles_of_fp8_gemm <= places
        return None if fills else _fullest((FP8Tile(64, 64, 2), FP8Tile(64, 96, 3)), weight_rows, multiprocessors)
    widths = (48, 32) if weight_rows * size < LARGE_BYTES else (48,)
    sharings = [sharing for sharing in (1, 2, 3) if size // sharing >= MIN_COLUMNS]
    tile = _fullest([FP8Tile(64, n, 1, sharing) for n in widths for sharing in sharings], weight_rows, places)
    blocks_of_fp8_gemm = tiles_of_fp8_gemm * max(1, min(4, 3 * places // 4 // tiles_of_fp8_gemm))
    enough = min(5 * places // 6, 3 * blocks_of_fp8_gemm // 2)
    return tile if tile and tile.num_blocks(weight_rows) >= enough else None


def _fullest(tiles: Sequence[FP8Tile], weight_rows: int, places: int) -> FP8Tile | None:
    """Return the tile with the most blocks that all run at once; None if they leave a third of the GPU free."""

    def blocks(tile: FP8Tile) -> int:
        return tile.num_blocks(weight_rows)

    most = [places * 9 // 10 if tile.sharing == 3 else places for tile in tiles]  # clusters of three leave gaps
    fitting = [tile for tile, at_once in zip(tiles, most, strict=True) if 2 * places // 3 <= blocks(tile) <= at_once]
    return max(fitting, key=blocks, default=None)


def quantizing_tile(rows: int, weight_rows: int, multiprocessors: int) -> FP8Tile | None:
    """Return the tile whose features are a group of columns of the next layer; None if another way is faster."""
    tile = FP8Tile(GROUP_ROWS, 64, 4)
    fits = FEW_ROWS < rows <= GROUP_ROWS and weight_rows % tile.weight_rows == 0
    return _fullest((tile,), weight_rows, multiprocessors) if fits else None


def launch_stream_fp8(
    out: Tensor | FP8Rows,
    numbers: Tensor,
    scales: Tensor,
    weight: FP8Weight,
    bias: Tensor | None,
    epilogue: int,
    tile: FP8Tile,
) -> None:
    """Write the products of FP8 rows to out [T, F], or add them; of `quantizing_tile` as FP8Rows.

    numbers, scales  of rows of x, from quantize_rows
    epilogue         the place in EPILOGUES of scaled_gemm.py
    """
    rows, features = out.shape
    to, out_scales = (out.numbers, out.scales) if isinstance(out, FP8Rows) else (out, None)
    types = f"{C_NAMES[out.dtype]}, {C_NAMES[to.dtype]}"
    launch = kernel(
        "stream_fp8.cu",
        f"stream_fp8<{types}, {tile.rows}, {tile.group_rows}, {tile.groups}>",
        shared_bytes=tile.stages * tile.stage_bytes + tile.extra_bytes,
        early=True,
        cluster=tile.sharing,
        architecture="sm_90a",
    )
    maps = tile_map(numbers[:rows], tile.rows), tile_map(weight.data, tile.group_rows // 2)
    sizes = rows, scales.shape[1], features, numbers.shape[1], weight.scales.shape[1]
    options = epilogue, tile.sharing, tile.stages
    tensors = to, optional(out_scales), maps[0], scales, maps[1], weight.scales, optional(bias)
    launch((tile.num_blocks(len(weight.data)), 1), tile.threads, *tensors, *map(np.int32, (*sizes, *options)))
