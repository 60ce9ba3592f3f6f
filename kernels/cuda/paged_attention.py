"""Launches of decode attention over the paged KV cache, and of the rotary embedding and KV stores before prefill."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..arguments import (
    MAX_CHUNKS,
    MAX_GROUP,
    FP8Rows,
    KeyPartition,
    KVCache,
    Matrix,
    Pages,
    QKNorm,
    Rope,
    Rows,
    num_groups,
)
from .gemm import MAX_SKINNY_ROWS
from .kernel_launch import c_name, kernel, num_multiprocessors, optional
from .launch_parameters import Argument
from .scaled_gemm import GROUP, fp8_rows, takes_fp8_rows

LOG2_E = 1.4426950408889634
STORE_THREADS = 128
PARTITION_THREADS = 1024  # threads of the one block that partitions keys
BLOCKS = 4  # of four warps, on a multiprocessor at once; with heads of 256 elements 2
PART_INTS = 12  # of a PartStart of key_partition.cuh
NEVER = 1 << 30  # more parts than there are


def rotate_and_store_(qkv: Tensor, norm: QKNorm, rope: Rope, cache: KVCache, kv_slots: Tensor) -> Tensor:
    tokens, (pages, page_size, kv_heads, head_dim) = qkv.shape[0], cache.k.shape
    heads = qkv.shape[1] // head_dim
    q = qkv.new_empty(tokens, heads - 2 * kv_heads, head_dim)
    if tokens == 0:
        return q
    pairs = next((n for n in (1, 2, 4, 8) if 64 * n >= head_dim), None)
    if pairs is None:
        raise ValueError(f"heads of {head_dim} elements are too long to rotate; at most 512")
    strides = head_dim // 2, rope.cos_sin.shape[1] // 2, qkv.stride(0), *cache.k.stride()[:3]
    starts = [t.data_ptr() // t.element_size() for t in (qkv, q, cache.k, cache.v)]
    # Adjacent elements of a lane, as in decode_attention.cu, so that both kernels round alike.
    v = math.gcd(4, pairs, *strides, *starts)
    launch = kernel(
        "rotate_and_store.cu", f"rotate_and_store<{c_name(qkv)}, {c_name(cache.k)}, {pairs}, {v}>", early=True
    )
    page, token, head, _ = cache.k.stride()
    head_arguments = (
        *_head_arguments(norm, Rope(rope.positions.int(), rope.cos_sin), cache),
        np.int64(page),
        np.int64(token),
    )
    shape = page_size, pages * page_size, heads, kv_heads, head_dim
    launch(
        (tokens, 1),
        STORE_THREADS,
        *(q, qkv, np.int64(qkv.stride(0)), *head_arguments, np.int32(head), kv_slots.int(), *map(np.int32, shape)),
    )
    return q


def _head_arguments(norm: QKNorm, rope: Rope, cache: KVCache) -> tuple[Argument, ...]:
    norms = optional(norm.q), optional(norm.k), np.float32(norm.eps)
    return *norms, rope.positions, rope.cos_sin, *map(np.int32, rope.cos_sin.shape), *cache


@functools.cache
def _strides_in_units(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[np.int32]:
    """Return the unit, which is the number of elements that divides all strides, and the strides in units.

    shape, strides  of pages, tokens and heads
    """
    unit = math.gcd(*strides)
    if sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) >= unit << 32:
        raise ValueError(
            f"a KV cache of {shape} heads with strides {strides} is longer than 2^32 times {unit} elements"
        )
    return [np.int32(number) for number in (unit, *(stride // unit for stride in strides))]


class PartitionLayout(NamedTuple):
    """The division of a step's keys among blocks, and the layout of its tensor; mirrors Partition of key_partition.cuh.

    A chunk is `kv_chunk` keys of one row; the last chunk of a row may have fewer. A part is a run of chunks. The tensor
    is the first keys of each part, two counts, the rows' first chunks, and a counter for each row and group of heads.
    """

    warps: int  # per block
    kv_chunk: int  # keys
    min_chunks: int  # per part, unless a whole row has fewer
    max_parts: int
    slack: int  # chunks; parts are whole rows if none exceeds equal parts by as many
    enough_parts: int  # of whole rows use the GPU; none of them may then exceed their mean by the slack


@functools.cache
def _partition_layout(rows: int, groups: int, device: int, kv_chunk: int | None) -> PartitionLayout:
    if kv_chunk is not None:
        return PartitionLayout(4, kv_chunk, 1, MAX_CHUNKS * rows, 0, NEVER)
    multiprocessors = num_multiprocessors(device)
    if rows * groups > multiprocessors:  # a chunk is what a block takes at once
        slack = 8 if rows * groups <= 2 * multiprocessors else 4
        max_parts = max(1, BLOCKS * multiprocessors // groups)
        return PartitionLayout(4, 64, 4, max_parts, slack, -(-2 * multiprocessors // groups))
    # Few blocks get more warps each: fewer other blocks hide a block's latency.
    max_parts = max(1, multiprocessors // groups)
    rest = max_parts % max(1, rows)
    if 16 * rest <= max_parts:
        max_parts -= rest  # rows of one length are best divided at their ends
    if rows == 1:  # no block has keys of one row and of another
        return PartitionLayout(8, 128, 2, max_parts, 0, NEVER)
    return PartitionLayout(8, 128, 4, max_parts, 4, NEVER)


def partition_keys(
    positions: Tensor, table_rows: Tensor, groups: int, window: int | None, kv_chunk: int | None = None
) -> KeyPartition:
    rows = len(positions)
    layout = _partition_layout(rows, groups, positions.device.index, kv_chunk)
    table = positions.new_zeros(layout.max_parts * PART_INTS + 2 + rows + 1 + rows * groups)
    if rows:
        launch = kernel("partition_keys.cu", "partition_keys")
        sizes = map(np.int32, (rows, window or 0, *layout[1:]))
        launch((1, 1), PARTITION_THREADS, table, positions, table_rows, *sizes)
    return KeyPartition(table, window, kv_chunk)


def _key_arguments(
    cache: KVCache, kv_slots: Tensor, pages: Pages, partition: KeyPartition, kv_chunk: int
) -> tuple[Argument, ...]:
    """Return the arguments from `unit` to `kv_chunk` of the kernel: where keys are, and which of them a part has."""
    num_pages, page_size = cache.k.shape[:2]
    unit_and_strides = _strides_in_units(cache.k.shape[:3], cache.k.stride()[:3])
    slots = kv_slots, np.int32(num_pages * page_size)
    table = pages.table, np.int64(pages.table.stride(0)), pages.table_rows, np.int32(page_size)
    reciprocal = np.int64(-(-(1 << 32) // page_size))
    return (
        *unit_and_strides,
        *slots,
        *table,
        reciprocal,
        partition.table,
        np.int32(partition.window or 0),
        np.int32(kv_chunk),
    )


def decode_attention(
    qkv: Tensor,
    norm: QKNorm,
    rope: Rope,
    cache: KVCache,
    kv_slots: Tensor,
    pages: Pages,
    partition: KeyPartition,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    feeds: Matrix | None = None,
) -> Rows:
    rows, (kv_heads, head_dim) = qkv.shape[0], cache.k.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    result: Rows
    if out is not None:
        result = out
    elif head_dim == GROUP and takes_fp8_rows(feeds, qkv):
        result = fp8_rows(rows, heads * head_dim, qkv)
    else:
        result = qkv.new_empty(rows, heads * head_dim)
    if rows:
        launch_decode_attention(result, qkv, norm, rope, cache, kv_slots, pages, partition, scale, softcap, sinks)
    return result


def launch_decode_attention(
    out: Rows,
    qkv: Tensor,
    norm: QKNorm,
    rope: Rope,
    cache: KVCache,
    kv_slots: Tensor,
    pages: Pages,
    partition: KeyPartition,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Write the attention of at least one row to `out`."""
    rows, (kv_heads, head_dim) = qkv.shape[0], cache.k.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    groups = num_groups(heads, kv_heads)
    layout = _partition_layout(rows, groups, qkv.device.index, partition.kv_chunk)
    # For each part two partial results: of the row that it begins with, and of the row that it ends with.
    partial = torch.empty(2 * layout.max_parts * heads * (head_dim + 4), dtype=torch.float32, device=qkv.device)
    # With kv_chunk the previous kernel may have stored keys that this one reads: all keys of a prefill come first.
    early = partition.kv_chunk is None
    capped = "false" if softcap is None else "true"
    numbers, scales = (out.numbers, out.scales) if isinstance(out, FP8Rows) else (out, None)
    types = ", ".join(map(c_name, (qkv, cache.k, numbers)))
    name = f"decode_attention<{types}, {head_dim}, {layout.warps}, {capped}>"
    shared_bytes = 4 * layout.warps * MAX_GROUP * (head_dim + 4)  # WarpSums of the kernel
    launch = kernel("decode_attention.cu", name, shared_bytes=shared_bytes, early=early)
    grid, threads = (layout.max_parts * kv_heads, groups // kv_heads), 32 * layout.warps
    results = partial, partition.table[-rows * groups :]  # partial results, then the counters
    factors = (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)
    # Heads of more rows are loaded first: measured behind cuBLAS, which starts nothing early.
    keys_first = early and rows <= MAX_SKINNY_ROWS
    shape = *map(np.float32, factors), optional(sinks), *map(np.int32, (heads, kv_heads, keys_first))
    heads_of_rows = qkv, np.int32(qkv.stride(0)), *_head_arguments(norm, rope, cache)
    keys = _key_arguments(cache, kv_slots, pages, partition, layout.kv_chunk)
    to = numbers, optional(scales), np.int32(0 if scales is None else scales.shape[1])
    launch(grid, threads, *to, *heads_of_rows, *keys, *results, *shape)
