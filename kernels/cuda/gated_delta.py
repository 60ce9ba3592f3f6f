"""Launches of the kernels of the gated delta rule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..arguments import StateRows
from .kernel_launch import Argument, c_name, kernel, optional

CONV_THREADS = 128
COLUMNS, THREADS = 16, 128  # columns and threads of a block of gated_delta


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
    qkv, gates = qkv.contiguous(), gates.contiguous()
    out = qkv.new_empty(len(qkv), heads * value_size)
    if len(qkv):
        key_heads = (qkv.shape[1] - heads * value_size) // (2 * key_size)
        launch = kernel("gated_delta.cu", f"gated_delta<{c_name(qkv)}, {key_size}>", early=True)
        grid = len(rows.slots) * heads, value_size // COLUMNS
        sizes = map(np.int32, (key_heads, heads, value_size))
        launch(grid, THREADS, out, qkv, gates, decay.contiguous(), states, *sizes, *_row_arguments(rows))
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, size = x.contiguous(), len(weight)
    out = torch.empty_like(x)
    if x.numel():
        launch = kernel("gated_delta.cu", f"gated_rms_norm<{c_name(x)}>", early=True)
        inputs = x, gate, np.int64(gate.stride(0)), weight
        launch((len(x), x.shape[1] // size), 32, out, *inputs, np.int32(size), np.float32(eps))
    return out


def _row_arguments(rows: StateRows) -> tuple[Argument, ...]:
    return rows.slots, rows.starts, optional(rows.saves)
