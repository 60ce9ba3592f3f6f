"""Tensor maps: how Hopper's copy engine finds the tiles of a matrix; encoded by the driver, passed to kernels by value.

A tile is as wide as the 128 bytes that are swizzled together, which is how the tensor cores want it in shared memory.
By ctypes: the driver wants 64-byte alignment, which the objects of cuda-bindings need not have.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

TILE_COLUMNS, TILE_ROWS = 64, 128
FLOAT16, BFLOAT16 = 6, 9  # CUtensorMapDataType
NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 0, 3, 3, 0
ALIGNMENT = 64


class TensorMap(ctypes.Structure):
    """A CUtensorMap, opaque."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


def map_rows(x: Tensor, rows: int) -> TensorMap:
    """Tiles of `rows` rows of x [T, D], 16-bit elements, D a multiple of 8; rows that x lacks are zeros."""
    num_rows, size = x.shape
    return _encode(x.data_ptr(), x.dtype, (size, num_rows), (2 * size,), (TILE_COLUMNS, rows))


def map_weight(weight: Tensor, gated: bool) -> TensorMap:
    """Tiles of 128 rows of a weight [F, D]; gated [2 F, D]: 8 rows of the first half, the same of the second, and so on."""
    num_rows, size = weight.shape
    if not gated:
        return _encode(weight.data_ptr(), weight.dtype, (size, num_rows), (2 * size,), (TILE_COLUMNS, TILE_ROWS))
    shape = size, 8, 2, num_rows // 16
    strides = 2 * size, num_rows * size, 16 * size  # bytes; of all dimensions but the first
    return _encode(weight.data_ptr(), weight.dtype, shape, strides, (TILE_COLUMNS, 8, 2, TILE_ROWS // 16))


@functools.lru_cache(maxsize=8192)
def _encode(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], tile: tuple[int, ...]
) -> TensorMap:
    """A map depends on these alone: it may be kept, whatever becomes of the memory."""
    dimensions = len(shape)
    room = (ctypes.c_char * (ctypes.sizeof(TensorMap) + ALIGNMENT))()
    aligned = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        BFLOAT16 if dtype == torch.bfloat16 else FLOAT16,
        dimensions,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * dimensions)(*shape),
        (ctypes.c_uint64 * (dimensions - 1))(*strides),
        (ctypes.c_uint32 * dimensions)(*tile),
        (ctypes.c_uint32 * dimensions)(*[1] * dimensions),
        NO_INTERLEAVE,
        SWIZZLE_128B,
        PROMOTE_256B,
        FILL_ZEROS,
    )
    if status != 0:
        raise RuntimeError(
            f"cannot map {list(shape)} {dtype} at {address:#x} in tiles of {list(tile)}: CUDA error {status}"
        )
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, ctypes.sizeof(TensorMap)))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
