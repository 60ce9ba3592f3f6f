"""Launches of the kernels of the gated delta rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arguments import DeltaLayer, StateRows
from .kernel_launch import c_name, compute_capability, kernel, optional
from .launch_parameters import Argument

CONV_THREADS = 128
COLUMNS, HEAD_THREADS = 16, 64  # mirror delta_rule.cuh
MAX_CLUSTER, MAX_GROUP = 8, 4  # blocks of a cluster, and value heads of a key head, of delta_step


def causal_conv_(x: Tensor, weight: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    channels, taps = weight.shape
    out = x.new_empty(len(x), channels)
    if len(x):
        launch = kernel("gated_delta.cu", f"causal_conv<{c_name(x)}, {taps}>", early=True)
        grid = -(-channels // CONV_THREADS), len(rows.slots)
        sizes = np.int64(x.stride(0)), weight.contiguous(), states, np.int32(channels)
        launch(grid, CONV_THREADS, out, x, *sizes, *_row_arguments(rows))
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
        launch(grid, HEAD_THREADS, out, *inputs, states, *sizes, *_row_arguments(rows))
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, size = x.contiguous(), len(weight)
    out = torch.empty_like(x)
    if x.numel():
        launch = kernel("gated_delta.cu", f"gated_rms_norm<{c_name(x)}>", early=True)
        inputs = x, gate, np.int64(gate.stride(0)), weight
        launch((len(x), x.shape[1] // size), 32, out, *inputs, np.int32(size), np.float32(eps))
    return out


def delta_net_(
    x: Tensor, z: Tensor, gates: Tensor, layer: DeltaLayer, inputs: Tensor, sums: Tensor, rows: StateRows
) -> Tensor:
    clusters = x.is_cuda and compute_capability(x.device.index)[0] >= 9
    if clusters and 0 < len(x) == len(rows.slots) and _step_takes(layer, sums):
        return delta_step(x, z, gates, layer, inputs, sums, rows)
    qkv = causal_conv_(x, layer.taps, inputs, rows)
    return gated_rms_norm(gated_delta_(qkv, gates, layer.decay, sums, rows), z, layer.norm, layer.eps)


def _step_takes(layer: DeltaLayer, sums: Tensor) -> bool:
    """Return whether delta_step has these sizes of heads, so many taps, and value heads of a key head."""
    heads, key_size, value_size = sums.shape[1:]
    group = _group(layer, sums)
    fits = value_size % COLUMNS == 0 and value_size // COLUMNS <= MAX_CLUSTER and key_size % 32 == 0
    taps = layer.taps.shape[1]
    return fits and taps in (1, 2, 4, 8) and group <= MAX_GROUP and heads % group == 0  # taps load as one vector


def _group(layer: DeltaLayer, sums: Tensor) -> int:
    """Return the value heads of each key head."""
    heads, key_size, value_size = sums.shape[1:]
    return int(2 * key_size * heads // (len(layer.taps) - heads * value_size))


def delta_step(
    x: Tensor, z: Tensor, gates: Tensor, layer: DeltaLayer, inputs: Tensor, sums: Tensor, rows: StateRows
) -> Tensor:
    """Do `delta_net_` for one token of each row."""
    heads, key_size, value_size = sums.shape[1:]
    group, parts = _group(layer, sums), value_size // COLUMNS
    out = x.new_empty(len(x), heads * value_size)
    name = f"delta_step<{c_name(x)}, {key_size}, {layer.taps.shape[1]}, {group}>"
    shared_bytes = 4 * (2 * group * COLUMNS + group * value_size + 2 * key_size)
    launch = kernel("delta_step.cu", name, shared_bytes=shared_bytes, early=True, cluster=parts)
    strided = [a for tensor in (x, z, gates) for a in (tensor, np.int64(tensor.stride(0)))]
    weights = layer.taps.contiguous(), layer.decay.contiguous(), layer.norm
    sizes = np.int32(heads // group), np.int32(value_size), np.float32(layer.eps)
    grid = len(x) * heads // group * parts, 1
    launch(grid, HEAD_THREADS * group, out, *strided, *weights, inputs, sums, *sizes, *_row_arguments(rows))
    return out


def _row_arguments(rows: StateRows) -> tuple[Argument, ...]:
    return rows.slots, rows.starts, optional(rows.saves)
