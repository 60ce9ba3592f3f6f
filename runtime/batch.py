"""One step as tensors: what the decoder and the attention backend read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows (one request each) with T tokens in all, row after row; decode rows have one token, prefill rows more.

    Lengths live on the host, where attention plans are made; what kernels index with lives on the device.
    """

    token_ids: Tensor  # [T] int32, on the device
    positions: Tensor  # [T] int32, on the device: the place of each token in its request
    kv_slots: Tensor  # [T] int32, on the device: page * page_size + offset, where its K and V go
    page_table: Tensor  # [B, P] int32, on the device: the pages of each row in order; beyond its length anything
    query_starts: np.ndarray  # [B + 1] int32, on the host: row b has tokens query_starts[b]:query_starts[b + 1]
    kv_lengths: np.ndarray  # [B] int32, on the host: keys that the last token of the row sees, itself included
    sampled_tokens: Tensor  # [S] int64, on the device: which of the T tokens need logits (the last of some rows)

    @property
    def num_rows(self) -> int:
        return len(self.kv_lengths)
