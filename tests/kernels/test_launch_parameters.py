"""The memory that the CUDA driver reads at a launch, read in its place: no GPU is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.kernels.cuda.launch_parameters import LaunchParameters

from ..support.emulator import emulated

NULL = np.int64(0)


@dataclass
class TileMapAt:
    """A stand-in for driver.CUtensorMap at an address."""

    address: int

    def getPtr(self) -> int:
        return self.address


def read(address: int, types: Sequence[type[Any]]) -> list[Any]:
    """Return what a kernel with parameters of these ctypes gets; a tile map is its address."""
    values = []
    for place, kind in zip((ctypes.c_void_p * len(types)).from_address(address), types, strict=True):
        values.append(place if kind is TileMapAt else kind.from_address(place).value or 0)
    return values


def test_kernel_gets_the_arguments_of_each_launch() -> None:
    types = [ctypes.c_void_p, TileMapAt, ctypes.c_int32, ctypes.c_void_p, ctypes.c_float, TileMapAt, ctypes.c_int64]
    parameters, x, y = LaunchParameters(), torch.zeros(3), torch.zeros(5)
    first = [x, TileMapAt(640), np.int32(-7), y, np.float32(0.1), TileMapAt(1280), np.int64(-(2**40))]
    expected = [x.data_ptr(), 640, -7, y.data_ptr(), np.float32(0.1), 1280, -(2**40)]
    assert read(parameters.address_of(first), types) == expected
    second = [y, TileMapAt(64), np.int32(2**31 - 1), NULL, np.float32(-3), TileMapAt(128), np.int64(5)]
    assert read(parameters.address_of(second), types) == [y.data_ptr(), 64, 2**31 - 1, 0, -3, 128, 5]


def test_null_pointer_becomes_a_tensor() -> None:
    parameters, x = LaunchParameters(), torch.zeros(3)
    parameters.address_of([NULL, np.int32(1)])
    assert read(parameters.address_of([x, np.int32(2)]), [ctypes.c_void_p, ctypes.c_int32]) == [x.data_ptr(), 2]


def test_threads_do_not_share_the_memory() -> None:
    """A thread may be interrupted between the storing of its arguments and its launch."""
    parameters = LaunchParameters()
    address = parameters.address_of([np.int32(1)])
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(parameters.address_of, [np.int32(2)]).result()
        assert read(address, [ctypes.c_int32]) == [1]
        assert read(other, [ctypes.c_int32]) == [2]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("size", [6, 8, 12, 24])
@pytest.mark.parametrize("stride", [2, 8])
def test_vectors_divide_rows_and_start_where_the_hardware_can_load_them(
    dtypes: tuple[torch.dtype, ...], size: int, stride: int
) -> None:
    width = 16 // max(dtype.itemsize for dtype in dtypes)
    for offsets in np.ndindex(9, 9):
        tensors = [torch.zeros(64, dtype=dtype)[offset:] for dtype, offset in zip(dtypes, offsets, strict=True)]
        starts = all(t.data_ptr() % (width * t.element_size()) == 0 for t in tensors)
        expected = width if starts and size % width == 0 and stride % width == 0 else 1
        assert emulated().vector_width(size, *tensors, strides=(stride,)) == expected
