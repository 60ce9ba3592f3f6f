"""The inputs of one step on the device, as the decoder and the attention backends read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...kernels.arguments import StateRows


@dataclass(frozen=True, kw_only=True)
class HostBatch:
    """The part of a step that is on the host: arrays int32, per token [T] or per row [B], of G groups of layers."""

    slots: np.ndarray  # [T]: the slot of each token
    positions: np.ndarray  # [T]: position of each token in its request
    kv_slots: np.ndarray  # [G, T]: place of each token's K and V, page * page_size + offset
    page_table: np.ndarray  # [G, B, P]: pages of each row, in order; any pages beyond its length and out of the window
    query_starts: np.ndarray  # [B + 1]: row b has tokens query_starts[b]:query_starts[b + 1]
    kv_lengths: np.ndarray  # [B]: keys that the last token of the row sees, itself included
    num_decoding: int  # leading rows of one token each, which read no keys that another row stores in this step

    @property
    def num_rows(self) -> int:
        return len(self.kv_lengths)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows (one request each) of T tokens in total, row after row. Decode rows have one token, prefill rows more.

    Tensors are int32 on the device, for kernels. Attention backends make their plans from `host`.
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]: position of each token in its request
    kv_slots: Sequence[Tensor]  # G of [T]: page * page_size + offset, the place of its K and V; negative: not stored
    page_table_rows: Tensor  # [T]: row of device_page_table for each token, its slot
    device_page_table: Sequence[Tensor]  # G of [slots, P]: pages of each slot, in order; as those of HostBatch
    host: HostBatch
    state_rows: StateRows | None = None  # for layers with a recurrent state

    def part(self, tokens: slice) -> Batch:
        """Return the tensors per token of these tokens, and all else of the whole batch."""
        kv_slots = [of_group[tokens] for of_group in self.kv_slots]
        ids, positions, rows = self.token_ids[tokens], self.positions[tokens], self.page_table_rows[tokens]
        return replace(self, token_ids=ids, positions=positions, kv_slots=kv_slots, page_table_rows=rows)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy `array` to the device; the host does not wait."""
    return _host_tensor(array, device).to(device, non_blocking=True)


def copy_to_device(array: np.ndarray, target: Tensor) -> None:
    """Copy `array` into `target` on a device; the host does not wait."""
    target.copy_(_host_tensor(array, target.device), non_blocking=True)


def _host_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    # Pinned: a copy from other memory would wait for the steps before it. torch reuses the buffer after the copy.
    return tensor if device.type == "cpu" else tensor.pin_memory()


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy one-dimensional arrays in one transfer; wider types must come first, so that all are aligned."""
    packed = to_device(np.concatenate([array.view(np.uint8) for array in arrays]), device)
    parts = packed.split([array.nbytes for array in arrays])
    return [part.view(torch.from_numpy(array).dtype) for part, array in zip(parts, arrays, strict=True)]
