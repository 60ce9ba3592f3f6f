"""The inputs of one step on the device, as the decoder and the attention backends read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows (one request each) with T tokens in all, row after row; decode rows have one token, prefill rows more.

    Lengths and pages are on the host, where attention plans are made; what kernels index with is on the device, the
    pages once more with it.
    """

    token_ids: Tensor  # [T] int32, on the device
    positions: Tensor  # [T] int32, on the device: the place of each token in its request
    kv_slots: Tensor  # [T] int32, on the device: page * page_size + offset, where its K and V go; negative: nowhere
    owners: Tensor  # [T] int32, on the device: the row of `pages` that has the pages of each token's row
    pages: Tensor  # [R, P] int32, on the device: pages in order; beyond a row's length anything
    page_table: np.ndarray  # [B, P] int32, on the host: the pages of each row in order; beyond its length anything
    query_starts: np.ndarray  # [B + 1] int32, on the host: row b has tokens query_starts[b]:query_starts[b + 1]
    kv_lengths: np.ndarray  # [B] int32, on the host: keys that the last token of the row sees, itself included
    num_decoding: int  # rows that come first, of one token each, and read nothing that another row stores in this step

    @property
    def num_rows(self) -> int:
        return len(self.kv_lengths)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on the device, for which the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # Pinned: from other memory the copy would wait for the steps before it. torch reuses the buffer when it is done.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies of one-dimensional arrays, those of wider numbers first so that all are aligned, by one transfer."""
    whole = to_device(np.concatenate([array.view(np.uint8) for array in arrays]), device)
    parts = whole.split([array.nbytes for array in arrays])
    return [part.view(torch.from_numpy(array).dtype) for part, array in zip(parts, arrays, strict=True)]
