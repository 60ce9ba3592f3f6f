"""The arguments of a kernel launch in memory, where the CUDA driver reads them."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

TileMap = Any  # driver.CUtensorMap
Argument = Tensor | np.int64 | np.int32 | np.float32 | TileMap
SLOT_BYTES = 8
# Formats of `struct` that fill a slot, by the type of an argument. A tensor is its address.
FORMATS: dict[type, str] = {Tensor: "q", np.int64: "q", np.int32: "i4x", np.float32: "f4x"}


class LaunchParameters(threading.local):
    """Memory for the arguments of one kernel's launches, and the array of their addresses; each thread has its own.

    A step with prompts has hundreds of launches. cuda-bindings takes longer to convert arguments.
    """

    _layout: struct.Struct | None = None

    def address_of(self, arguments: Sequence[Argument]) -> int:
        """Store the arguments of a launch, and return the address of the array of their addresses.

        Their types are those of the first call; a tensor can be np.int64(0), the null pointer, in some calls.
        """
        layout = self._layout or self._allocate(arguments)
        for index in self._tile_maps:
            tile_map: TileMap = arguments[index]
            self._addresses[index] = int(tile_map.getPtr())
        scalars = [a.data_ptr() if type(a) is Tensor else a for a in arguments if type(a) in FORMATS]
        layout.pack_into(self._memory, 0, *scalars)
        return ctypes.addressof(self._addresses)

    def _allocate(self, arguments: Sequence[Argument]) -> struct.Struct:
        size = SLOT_BYTES * len(arguments)
        self._memory = ctypes.create_string_buffer(size)
        first = ctypes.addressof(self._memory)
        self._addresses = (ctypes.c_void_p * len(arguments))(*range(first, first + size, SLOT_BYTES))
        self._tile_maps = [index for index, a in enumerate(arguments) if type(a) not in FORMATS]
        self._layout = struct.Struct("=" + "".join(FORMATS.get(type(a), f"{SLOT_BYTES}x") for a in arguments))
        return self._layout
