"""Named tuples of op arguments. B rows or T tokens, H query heads, Hkv KV heads, E head size."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_CHUNKS = 8  # the most chunks of a row in a KeyPartition with kv_chunk


class KVCache(NamedTuple):
    """One layer's pages of keys and values: [pages, page_size, Hkv, E] each, any strides; ops update them in place."""

    k: Tensor
    v: Tensor


class QKNorm(NamedTuple):
    """RMSNorm over each head of q and k: weights [E], or None for no norm."""

    q: Tensor | None
    k: Tensor | None
    eps: float


class Rope(NamedTuple):
    """Rotary embedding: positions [T] int32, and a table [P, R] float32 of cosines, then sines, by position.

    The first R elements of a head are rotated, their two halves as pairs (GPT-NeoX order). An empty table, P = 0,
    rotates nothing.
    """

    positions: Tensor
    cos_sin: Tensor


class Pages(NamedTuple):
    """A table of pages [R, P] int32, and for each row of a batch its row of that table, [B] int32.

    The page of position p is `table[table_rows[b], p // page_size]`.
    """

    table: Tensor
    table_rows: Tensor


class KeyPartition(NamedTuple):
    """The division of `decode_attention`'s keys among thread blocks, from `partition_keys`, once per step.

    table     int32, empty on a CPU; the layout is PartitionLayout of cuda/paged_attention.py
    window    a query at position p sees the keys p - window < j <= p; None: all j <= p
    kv_chunk  keys per chunk, so that a row is bitwise identical in any batch; a row may have MAX_CHUNKS chunks.
              None: chunks that use the GPU best; rounding then depends on the other rows
    """

    table: Tensor
    window: int | None
    kv_chunk: int | None
