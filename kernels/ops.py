"""The ops of a decoder step: check the arguments, choose the implementation by the tensors' device, launch.

One function per op, each with the same signature as its definition in `reference.py`. A trailing underscore means
that an argument is written in place. Shapes: T tokens, D hidden size, H heads, E head size, I intermediate size,
V rows of a vocabulary shard. Argument errors are ValueErrors that name the tensor and the rule.

CUDA tensors go to the kernels of `cuda.py`, all others to the definitions.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import jit, reference


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    """`out[t] = weight[ids[t] - first_row]`, or zero where that row is not in `weight`; returns [T, D].

    weight  [V, D]  one rank's rows of the embedding
    ids     [T]     int32 or int64, on the same device
    Summing `out` over the ranks of a vocabulary-parallel embedding gives the full lookup.
    """
    _require(weight.dim() == 2, "weight", weight, "must be [V, D]")
    _require(ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64), "ids", ids, "must be [T], int32 or int64")
    return _on(weight).gather_rows(weight, ids, first_row=first_row)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, returned in x's dtype.

    x  [..., D]; weight  [D]
    """
    _require(weight.shape == x.shape[-1:], "weight", weight, f"must be [{x.shape[-1]}] for x {list(x.shape)}")
    return _on(x).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual += x`, then the RMSNorm of that sum (unrounded, float32) in x's dtype; returns [T, D].

    x, residual  [T, D], same shape and dtype; residual is updated in place
    weight       [D]
    """
    _require(x.shape == residual.shape, "residual", residual, f"must have the shape of x, {list(x.shape)}")
    _require(weight.shape == x.shape[-1:], "weight", weight, f"must be [{x.shape[-1]}] for x {list(x.shape)}")
    return _on(x).add_rms_norm(x, residual, weight, eps)


def rotate_and_store_(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """What lies between the QKV projection and attention: norm and rotate q and k, store k and v; q [T, H, E].

    qkv               [T, (H + 2 Hkv) E]  heads of q, then k, then v; contiguous
    q_norm, k_norm    [E]     weights of RMSNorm over each head, or None
    positions         [T]     int32
    cos_sin           [P, E]  float32, cosines in the first half of a row, sines in the second; the halves of a head
                              are rotated as pairs (GPT-NeoX order)
    k_cache, v_cache  [pages, page_size, Hkv, E], slots [T]: as in `store_kv_`; updated in place
    Computed in float32, rounded once.
    """
    _require(qkv.dim() == 2 and qkv.is_contiguous(), "qkv", qkv, "must be [T, (H + 2 Hkv) E], contiguous")
    _require(qkv.shape[1] % k_cache.shape[3] == 0, "qkv", qkv, f"must have heads of size {k_cache.shape[3]}")
    _require(qkv.shape[1] > 2 * k_cache.shape[2] * k_cache.shape[3], "qkv", qkv, "must have heads of q, k and v")
    _require(cos_sin.shape[-1] == k_cache.shape[3], "cos_sin", cos_sin, f"must be [P, {k_cache.shape[3]}]")
    _require(positions.shape == qkv.shape[:1], "positions", positions, f"must be [{len(qkv)}], one per row of qkv")
    _require(slots.shape == qkv.shape[:1], "slots", slots, f"must be [{len(qkv)}], one per row of qkv")
    return _on(qkv).rotate_and_store_(qkv, q_norm, k_norm, eps, positions, cos_sin, k_cache, v_cache, slots)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(x[:, :I]) * x[:, I:]`, computed in float32; x [T, 2 I] -> [T, I] in x's dtype."""
    _require(x.shape[-1] % 2 == 0, "x", x, "must be [T, 2 I]")
    return _on(x).silu_and_mul(x)


def store_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write the keys and values of T tokens into their slots: `cache[slot // page_size, slot % page_size] = row`.

    k, v              [T, Hkv, E]
    k_cache, v_cache  [pages, page_size, Hkv, E], any strides (the layout of the pool), updated in place
    slots             [T]  int32 or int64; a negative slot is skipped; converts to the cache's dtype
    """
    _require(k.shape == v.shape, "v", v, f"must have the shape of k, {list(k.shape)}")
    _require(
        k_cache.shape == v_cache.shape, "v_cache", v_cache, f"must have the shape of k_cache, {list(k_cache.shape)}"
    )
    _require(k.shape[1:] == k_cache.shape[2:], "k", k, f"must be [T, {k_cache.shape[2]}, {k_cache.shape[3]}]")
    _require(slots.shape == k.shape[:1], "slots", slots, f"must be [{len(k)}], one per row of k")
    _on(k).store_kv_(k, v, k_cache, v_cache, slots)


def race(logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """A token per row, [S] int64: the likeliest where temperature is 0, else drawn from softmax(logits / temperature).

    logits       [S, V] float32, rows contiguous
    temperature  [S]    float32, >= 0
    keys         [S]    int64: row s draws with noise hashed from (keys[s], token) alone
    The draw is a race: token v wins with the least E(v) / p(v), E exponential. Equal scores go to the lower id.
    """
    _require(logits.dim() == 2 and logits.dtype == torch.float32, "logits", logits, "must be [S, V] float32")
    rows = logits.shape[:1]
    _require(
        temperature.shape == rows and temperature.dtype == torch.float32, "temperature", temperature, "must be [S]"
    )
    _require(keys.shape == rows and keys.dtype == torch.int64, "keys", keys, f"must be [{rows[0]}] int64")
    return _on(logits).race(logits, temperature, keys)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements of `a` and `b` are equal; both 1-D int32, contiguous, on the host."""
    compare = jit.radix_compare()
    if compare is None:
        return reference.common_prefix_length(a, b)
    return compare(a, b)


def _on(tensor: Tensor) -> ModuleType:
    """Where the ops for this tensor's device are."""
    return _cuda() if tensor.is_cuda else reference


@functools.cache
def _cuda() -> ModuleType:
    try:
        from . import cuda  # imports CuPy, which only machines with a GPU have
    except ImportError as error:
        raise RuntimeError(
            f"tensors on a GPU need CuPy, which does not import here ({error});"
            " install lockstep[cuda12] or lockstep[cuda13]"
        ) from error
    return cuda


def _require(holds: bool, name: str, tensor: Tensor, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} {rule}")
