"""Batch-invariant linear layers in bfloat16 or float16 on compute capability 9.0, by TMA and wgmma."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .kernel_launch import BOX_BYTES, c_name, compute_capability, kernel, num_multiprocessors, optional, tile_map
from .scaled_gemm import EPILOGUES, Epilogue, epilogue_of, target_of

FEW_ROWS = 16, 32, 64  # of x in a tile that has all of them
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of a multiprocessor, and of them for each block


class WideTile(NamedTuple):
    """A tile of wide_gemm. Its shape has no influence on the result."""

    weight_rows: int
    rows: int  # of x

    @property
    def blocks(self) -> int:
        """Return how many blocks a multiprocessor has registers for; see __launch_bounds__ in wide_gemm.cu."""
        return 2 if self.rows <= 128 else 1

    @property
    def stages(self) -> int:
        """Return how many steps fit into a block's share of the multiprocessor's memory."""
        return (SHARED_BYTES // self.blocks - RESERVED_BYTES) // self.stage_bytes

    @property
    def stage_bytes(self) -> int:
        return (self.weight_rows + self.rows) * BOX_BYTES + 16  # see Tile in wide_gemm.cu


def takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether `wide_linear` takes a weight that `check_batch_invariant` has checked. Rows of x do not count."""
    return x.dtype == weight.dtype and len(weight) % 8 == 0 and compute_capability(x.device.index) == (9, 0)


def wide_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, add_to: Tensor | None, out: Tensor | None
) -> Tensor:
    """Do `linear` of contiguous x without a norm."""
    target = target_of(x, len(weight), gated, add_to, out)
    if len(x):
        tile = choose_tile(len(x), len(weight), num_multiprocessors(x.device.index))
        launch_wide_gemm(target, x, weight, bias, epilogue_of(gated, add_to), tile)
    return target


@functools.lru_cache(maxsize=4096)
def choose_tile(rows: int, weight_rows: int, multiprocessors: int) -> WideTile:
    """Return the largest tile for so many rows of x whose blocks fill two thirds of a GPU, or the smallest."""
    few = next((n for n in FEW_ROWS if rows <= n), None)
    if few is None:
        tiles = [WideTile(128, 256), WideTile(128, 128), WideTile(64, 128)][rows <= 128 :]
    else:
        tiles = [WideTile(128, few), WideTile(64, few)]
    for tile in tiles:
        if 3 * -(-weight_rows // tile.weight_rows) * -(-rows // tile.rows) >= 2 * multiprocessors * tile.blocks:
            return tile
    return tiles[-1]


def launch_wide_gemm(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue, tile: WideTile
) -> None:
    """Write the products of x [T, D] to out [T, F], or add them."""
    rows, features = out.shape
    launch = kernel(
        "wide_gemm.cu",
        f"wide_gemm<{c_name(out)}, {tile.weight_rows}, {tile.rows}, {tile.stages}>",
        shared_bytes=tile.stages * tile.stage_bytes,
        early=True,
        architecture="sm_90a",
    )
    width = tile.weight_rows // (2 if epilogue == "SILU" else 1)
    grid = -(-features // width) * -(-rows // tile.rows), 1
    maps = tile_map(x, tile.rows), tile_map(weight, tile.weight_rows // 2)
    sizes = map(np.int32, (rows, features, x.shape[1], EPILOGUES.index(epilogue)))
    launch(grid, 2 * tile.weight_rows + 32, out, *maps, optional(bias), *sizes)
