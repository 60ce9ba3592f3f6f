"""The K/V memory of one rank, and the two orders in which its pages can lie.

Both layouts are the same five indices with other strides; what reads or writes a layer gets a view
[pages, page_size, Hkv, E] and never sees which one it is:

    layer-first  [layers, 2, pages, page_size, Hkv, E]   one layer is contiguous: short strides for attention
    page-first   [pages, layers, 2, page_size, Hkv, E]   one page is contiguous over all layers: moved as one block
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import KVLayout


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one rank's share of the cache looks like, but for the number of pages."""

    num_layers: int
    page_size: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return 2 * self.num_layers * self.page_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVPool:
    """`num_pages` pages of keys and values for every layer, allocated once."""

    def __init__(self, shape: KVShape, num_pages: int, device: torch.device, layout: KVLayout = "layer-first") -> None:
        self.shape = shape
        self.num_pages = num_pages
        self.layout = layout
        page = (shape.page_size, shape.num_kv_heads, shape.head_dim)
        outer = (shape.num_layers, 2, num_pages) if layout == "layer-first" else (num_pages, shape.num_layers, 2)
        self._memory = _zeros((*outer, *page), shape.dtype, device)

    def k(self, layer: int) -> Tensor:
        """The keys of one layer, a view [pages, page_size, Hkv, E]."""
        return self._view(layer, 0)

    def v(self, layer: int) -> Tensor:
        """The values of one layer, a view [pages, page_size, Hkv, E]."""
        return self._view(layer, 1)

    def _view(self, layer: int, which: int) -> Tensor:
        return self._memory[layer, which] if self.layout == "layer-first" else self._memory[:, layer, which]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros, but on a host the memory is not touched: pages that are never used cost neither time nor RAM."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
