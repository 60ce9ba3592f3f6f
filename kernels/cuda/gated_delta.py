"""Launches of the kernels of the gated delta rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arguments import DeltaLayer, StateRows
from .kernel_launch import c_name, compute_capability, kernel, optional, vector_width
from .launch_parameters import Argument

CONV_THREADS = 128
LANES = 8  # mirrors delta_rule.cuh
CONV_TOKENS, COLUMNS, THREADS = 8, 16, 64  # mirror gated_delta.cu
CHUNK, PAD, SCALES = 32, 8, 8  # mirror delta_chunks.cu
MAX_CHUNK_COLUMNS = 64  # of a block of delta_chunks
NORM_WARPS = 8  # of a block of gated_rms_norm
MAX_CLUSTER = 8  # blocks of a cluster of delta_step
MAX_FEW_ROWS = 1  # a head is divided among blocks of delta_step for so few rows


def causal_conv_(x: Tensor, weight: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    channels, taps = weight.shape
    out = x.new_empty(len(x), channels)
    if len(x):
        width = vector_width(channels, x, states, out, strides=(x.stride(0),))
        launch = kernel("gated_delta.cu", f"causal_conv<{c_name(x)}, {taps}, {width}>", early=True)
        grid = -(-channels // (CONV_THREADS * width)), len(x) // CONV_TOKENS + len(rows.slots)
        sizes = np.int32(channels), np.int32(len(rows.slots))
        inputs = x, np.int64(x.stride(0)), weight.contiguous(), states
        launch(grid, CONV_THREADS, out, *inputs, *sizes, *_row_arguments(rows))
    return out


def gated_delta_(qkv: Tensor, gates: Tensor, decay: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    heads, key_size, value_size = states.shape[1:]
    if key_size % 32 or value_size % COLUMNS:
        raise ValueError(f"heads of {key_size} and {value_size} elements are not multiples of 32 and {COLUMNS}")
    qkv = qkv.contiguous()
    out = qkv.new_empty(len(qkv), heads * value_size)
    if len(qkv):
        key_heads = (qkv.shape[1] - heads * value_size) // (2 * key_size)
        launch = kernel("gated_delta.cu", f"gated_delta<{c_name(qkv)}, {key_size}>", early=True)
        grid = len(rows.slots) * heads, value_size // COLUMNS
        sizes = map(np.int32, (key_heads, heads, value_size))
        inputs = qkv, gates, np.int64(gates.stride(0)), decay.contiguous()
        launch(grid, THREADS, out, *inputs, states, *sizes, *_row_arguments(rows))
    return out


def chunked_delta_(qkv: Tensor, gates: Tensor, decay: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    """Do `gated_delta_` for 16 bits in chunks of tokens on tensor cores; rounding depends on where a row starts."""
    heads, key_size, value_size = states.shape[1:]
    out = qkv.new_empty(len(qkv), heads * value_size)
    key_heads = (qkv.shape[1] - heads * value_size) // (2 * key_size)
    chunks = len(qkv) // CHUNK + len(rows.slots)
    matrices = qkv.new_empty(chunks, heads, 4, CHUNK, CHUNK)
    scales = torch.empty(chunks, heads, CHUNK, SCALES, device=qkv.device)
    launch = kernel("delta_chunks.cu", f"chunk_matrices<{c_name(qkv)}, {key_size}>", early=True)
    sizes = tuple(map(np.int32, (key_heads, heads, value_size)))
    inputs = qkv, gates, np.int64(gates.stride(0)), decay.contiguous()
    launch((chunks, key_heads), 128, matrices, scales, *inputs, *sizes, np.int32(len(rows.slots)), rows.starts)
    columns = min(value_size, MAX_CHUNK_COLUMNS)
    stage = 2 * CHUNK * (2 * (key_size + PAD) + columns + PAD + 4 * (CHUNK + PAD)) + 4 * CHUNK * SCALES
    launch = kernel(
        "delta_chunks.cu", f"delta_chunks<{c_name(qkv)}, {key_size}, {columns}>", shared_bytes=2 * stage, early=True
    )
    grid = len(rows.slots) * heads, value_size // columns
    launch(grid, 2 * columns, out, qkv, matrices, scales, states, *sizes, *_row_arguments(rows))
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    return _gated_rms_norm(torch.empty_like(x), x, gate, weight, eps)


def _gated_rms_norm(out: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.numel():
        size = len(weight)
        width = 4 if vector_width(size, x, out, gate, weight, strides=(gate.stride(0),)) > 1 else 1
        launch = kernel("gated_delta.cu", f"gated_rms_norm<{c_name(x)}, {width}>", early=True)
        heads = x.shape[1] // size
        sizes = map(np.int32, (size, heads, len(x) * heads))
        grid = -(-len(x) * heads // NORM_WARPS), 1
        launch(grid, 32 * NORM_WARPS, out, x, gate, np.int64(gate.stride(0)), weight, *sizes, np.float32(eps))
    return out


def delta_net_(
    x: Tensor,
    z: Tensor,
    gates: Tensor,
    layer: DeltaLayer,
    inputs: Tensor,
    sums: Tensor,
    rows: StateRows,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    out = x.new_empty(len(x), sums.shape[1] * sums.shape[3])
    n, decoding, others = rows.num_decoding, rows.decoding, rows.others
    if not _step_takes(x, layer, sums):
        n, others = 0, rows
    elif len(x) == len(rows.slots):
        n, decoding = len(x), rows
    if n:
        delta_step(x[:n], z[:n], gates[:n], layer, inputs, sums, decoding, out[:n])
    if n < len(x):
        qkv = causal_conv_(x, layer.taps, inputs, others)
        chunked = not batch_invariant and _chunks_take(x, sums)
        rule = chunked_delta_ if chunked else gated_delta_
        results = rule(qkv, gates, layer.decay, sums, others)
        _gated_rms_norm(out[n:], results[n:], z[n:], layer.norm, layer.eps)
    return out


def _chunks_take(x: Tensor, sums: Tensor) -> bool:
    """Return whether delta_chunks has this dtype and these sizes of heads."""
    key_size, value_size = sums.shape[2:]
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and key_size in (32, 64, 128)
        and value_size in (16, 32, 64, 128, 256)
    )


def _step_takes(x: Tensor, layer: DeltaLayer, sums: Tensor) -> bool:
    """Return whether delta_step runs here, with these sizes of heads, so many taps and value heads of a key head."""
    key_size, value_size = sums.shape[2:]
    clusters = x.is_cuda and compute_capability(x.device.index)[0] >= 9
    fits = value_size in (16, 32, 64, 128) and key_size % 32 == 0
    taps = layer.taps.shape[1]
    return clusters and fits and taps in (2, 4, 8) and _group(layer, sums) <= MAX_CLUSTER  # taps load as one vector


def _group(layer: DeltaLayer, sums: Tensor) -> int:
    """Return the value heads of each key head."""
    heads, key_size, value_size = sums.shape[1:]
    return int(2 * key_size * heads // (len(layer.taps) - heads * value_size))


def _step_columns(rows: int, group: int, key_size: int, value_size: int) -> tuple[int, int]:
    """Return the columns of a head that a block of delta_step has, and those of a thread."""
    if rows > MAX_FEW_ROWS:
        return value_size, 4 if key_size <= 128 else 2  # in registers
    columns = value_size
    while columns > COLUMNS and value_size // columns * group * 2 <= MAX_CLUSTER:
        columns //= 2
    return columns, 2


def delta_step(
    x: Tensor,
    z: Tensor,
    gates: Tensor,
    layer: DeltaLayer,
    inputs: Tensor,
    sums: Tensor,
    rows: StateRows,
    out: Tensor,
) -> None:
    """Do `delta_net_` for one token of each row."""
    heads, key_size, value_size = sums.shape[1:]
    group = _group(layer, sums)
    columns, width = _step_columns(len(x), group, key_size, value_size)
    parts = value_size // columns
    name = f"delta_step<{c_name(x)}, {key_size}, {layer.taps.shape[1]}, {width}, {columns}>"
    shared_bytes = 4 * (2 * columns + 2 * key_size + 32)
    launch = kernel("delta_step.cu", name, shared_bytes=shared_bytes, early=True, cluster=parts * group)
    strided = [a for tensor in (x, z, gates) for a in (tensor, np.int64(tensor.stride(0)))]
    weights = layer.taps.contiguous(), layer.decay.contiguous(), layer.norm
    sizes = *map(np.int32, (heads // group, group, value_size)), np.float32(layer.eps)
    grid = len(x) * heads * parts, 1
    launch(grid, LANES * columns // width, out, *strided, *weights, inputs, sums, *sizes, *_row_arguments(rows))


def _row_arguments(rows: StateRows) -> tuple[Argument, ...]:
    return rows.slots, rows.starts, optional(rows.saves)
