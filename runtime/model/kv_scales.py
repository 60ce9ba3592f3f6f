"""The scales of an FP8 KV cache in a checkpoint, moved into the weights around the attention.

The cache holds keys and values divided by their scales, which keeps them within the range of FP8. Queries times the
scale of the keys, and an output projection times the scale of the values, then give the same results: the attention
itself knows no scales. They are rounded up to powers of two, by which every dtype is multiplied exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.arguments import FP8Weight, Matrix
from .decoder import Attention, Decoder
from .tensor_files import TensorFiles

log = logging.getLogger(__name__)
SUFFIXES = {"k": (".k_scale", ".k_proj.k_scale"), "v": (".v_scale", ".v_proj.v_scale")}


def apply_kv_scales(decoder: Decoder, folder: Path) -> None:
    """Move `k_scale` and `v_scale` of the checkpoint into the decoder's loaded weights.

    Raises ValueError naming a scale that is not one positive number.
    """
    applied = 0
    with ExitStack() as stack:
        tensors = TensorFiles(folder, "pt", stack)
        for n, layer in enumerate(decoder.layers):
            if isinstance(layer.attention, Attention):
                k, v = (_factor(tensors, f"model.layers.{n}.self_attn", name) for name in "kv")
                _scale_keys(layer.attention, k)
                _scale_values(layer.attention, v)
                applied += (k, v) != (1.0, 1.0)
    if applied and decoder.comm.rank == 0:
        log.info("KV cache: scales of %d layers from the checkpoint, rounded up to powers of two", applied)


def _factor(tensors: Mapping[str, Any], module: str, which: str) -> float:
    """Return the power of two of a layer's scale, 1 if it has none."""
    for name in (module + suffix for suffix in SUFFIXES[which]):
        if name in tensors:
            scale = tensors[name][...].float()
            if scale.numel() != 1 or not 0 < scale.item() < math.inf:
                raise ValueError(f"{name} must be one positive number, not {scale.flatten().tolist()[:4]}")
            return float(2.0 ** math.ceil(math.log2(scale.item())))
    return 1.0


def _scale_keys(attention: Attention, factor: float) -> None:
    """Divide keys by the factor, and multiply queries: in their norms, which would undo it in the projections."""
    each, wide = attention.heads.norm, attention.wide_norm
    q_norm, k_norm = (each.q, each.k) if wide is None else wide.weights
    if q_norm is not None and k_norm is not None:
        q_norm *= factor
        k_norm /= factor
        return
    q, k, _ = _parts(attention)
    _scale_rows(attention, q, factor)
    _scale_rows(attention, k, 1 / factor)


def _scale_values(attention: Attention, factor: float) -> None:
    """Divide values by the factor, and multiply the output projection."""
    _scale_rows(attention, _parts(attention)[2], 1 / factor)
    output: Tensor = _multiplied(attention.output.weight)
    output *= factor


def _parts(attention: Attention) -> tuple[slice, slice, slice]:
    """Return the rows of queries, keys and values in the rank's projection."""
    q, total = attention.q_size, attention.qkv.weight.shape[0] - attention.num_gates
    middle = q + (total - q) // 2
    return slice(0, q), slice(q, middle), slice(middle, total)


def _scale_rows(attention: Attention, rows: slice, factor: float) -> None:
    weight, bias = attention.qkv.weight, attention.qkv.bias
    step = weight.rows if isinstance(weight, FP8Weight) else 1  # rows of queries, keys and values share no scales
    _multiplied(weight)[rows.start // step : -(-rows.stop // step)] *= factor
    if bias is not None:
        bias[rows] *= factor


def _multiplied(matrix: Matrix) -> Tensor:
    """Return the tensor whose multiplication multiplies the matrix."""
    return matrix.scales if isinstance(matrix, FP8Weight) else matrix
