"""One rank's KV memory, in one of two layouts.

Both layouts have the same five indices with different strides. Readers and writers get a view of a layer,
[pages, page_size, Hkv, E], and need not know the layout or the padding of heads:

    layer-first  [layers, 2, pages, page_size, Hkv, E]   a layer is contiguous: short strides for attention
    page-first   [pages, layers, 2, page_size, Hkv, E]   a page is contiguous over all layers: moved as one block
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.arguments import KVCache
from ..config import KVLayout


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The layers, heads and pages of one rank, for its KV cache and its attention backend."""

    num_layers: int  # that a page has; see LayerGroups
    num_heads: int  # query heads of this rank
    num_kv_heads: int  # KV heads of this rank
    head_dim: int
    page_size: int
    dtype: torch.dtype  # dtype of q and of the activations
    kv_dtype: torch.dtype | None = None  # dtype of keys and values in the cache; None: the same as dtype
    padded_head_dim: int | None = None  # elements that the cache has for a head, zeros at its end; None: as head_dim

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values in the cache."""
        return self.kv_dtype or self.dtype

    @property
    def stored_head_dim(self) -> int:
        """The elements that the cache has for a head."""
        return self.padded_head_dim or self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""
        elements = self.page_size * self.num_kv_heads * self.stored_head_dim
        return 2 * self.num_layers * elements * self.cache_dtype.itemsize


class KVPool:
    """`num_pages` pages of keys and values for the layers of any group, allocated once."""

    def __init__(self, shape: AttentionShape, num_pages: int, device: torch.device, layout: KVLayout) -> None:
        self.shape, self.num_pages, self.layout = shape, num_pages, layout
        page = (shape.page_size, shape.num_kv_heads, shape.stored_head_dim)
        outer = (shape.num_layers, 2, num_pages) if layout == "layer-first" else (num_pages, shape.num_layers, 2)
        memory = _zeros((*outer, *page), shape.cache_dtype, device)[..., : shape.head_dim]
        by_layer = memory if layout == "layer-first" else memory.movedim(0, 2)  # [layers, 2, pages, page_size, Hkv, E]
        self._layers = [KVCache(*layer) for layer in by_layer]

    def layer(self, layer: int) -> KVCache:
        """Return views [pages, page_size, Hkv, E] of the keys and values of the layer at this place in a page."""
        return self._layers[layer]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return torch.zeros; on a CPU the memory is not touched, so that unused pages cost neither time nor RAM."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
