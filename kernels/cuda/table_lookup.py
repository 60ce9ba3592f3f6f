"""Lookups in the embedding and in the tables by slot: tokens and pages at both ends of a decode step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .kernel_launch import MAX_THREADS, c_name, kernel, num_threads, vector_width


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    rows, size = weight.shape
    out = weight.new_empty(len(ids), size)
    if out.numel():
        v = vector_width(size, weight, out)
        launch = kernel("gather.cu", f"gather_rows<Vec<{c_name(weight)}, {v}>, {c_name(ids)}>")
        vectors = size // v
        threads = num_threads(vectors)
        parts = min(-(-vectors // threads), 4 if len(ids) < 256 else 1)
        launch((len(ids), parts), threads, out, weight, ids, np.int64(first_row), np.int64(rows), np.int32(vectors))
    return out


def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    rows, token_ids = len(slots), torch.empty_like(slots)
    if rows:
        tables = tokens, np.int64(tokens.stride(0)), pages, np.int64(pages.stride(0))
        sizes = np.int32(page_size), np.int32(rows)
        launch = kernel("slots.cu", "begin_decode")
        launch((-(-rows // MAX_THREADS), 1), MAX_THREADS, token_ids, *tables, slots, positions, kv_slots, *sizes)
    return token_ids


def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, new_tokens: Tensor) -> None:
    if rows := len(slots):
        inputs = tokens, np.int64(tokens.stride(0)), slots, positions, new_tokens
        kernel("slots.cu", "append_tokens")((-(-rows // MAX_THREADS), 1), MAX_THREADS, *inputs, np.int32(rows))
