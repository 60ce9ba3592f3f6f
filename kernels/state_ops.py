"""The ops of layers with a recurrent state, on the terms of ops.py: the gated delta rule and what surrounds it.

Shapes: T tokens, B rows of one request each, N states, C channels, K taps, Hk and Hv key and value heads, E and Ev
their sizes.
"""

# mypy: disable-error-code="return"

from __future__ import annotations

import torch
from torch import Tensor

from .argument_checks import require
from .arguments import DeltaLayer, StateRows
from .ops import op


@op("gated_delta")
def causal_conv_(x: Tensor, weight: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    """Return `silu(sum_j weight[c, j] * x[t - K + 1 + j, c])`, in float32 and rounded once: [T, C].

    x       [T, C], rows may have any stride
    weight  [C, K]
    states  [N, K - 1, C]  the last inputs of each request, updated in place
    """
    channels, taps = weight.shape
    require(x.dim() == 2 and x.shape[1] == channels and x.stride(1) == 1, "x", x, f"must be [T, {channels}]")
    _check_states(states, (taps - 1, channels), x.dtype)


@op("gated_delta")
def gated_delta_(qkv: Tensor, gates: Tensor, decay: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    """Return `q S` for each token after `S = g S + k (beta (v - k g S))`, computed in float32: [T, Hv Ev].

    qkv     [T, 2 Hk E + Hv Ev]  q and k are scaled to length E^-0.5 and 1; Hv / Hk value heads share a key head
    gates   [T, 2 Hv]            b, then a: beta = sigmoid(b); rows may have any stride
    decay   [2, Hv]              A, then bias: g = exp(-exp(A) softplus(a + bias))
    states  [N, Hv, E, Ev] float32  S of each request, updated in place
    Source: Gated Delta Networks (Yang et al., 2024, 2412.06464), token by token.
    """
    heads, key_size, value_size = states.shape[1:]
    keys = qkv.shape[-1] - heads * value_size
    require(keys > 0 and keys % (2 * key_size) == 0, "qkv", qkv, f"does not fit states {list(states.shape)}")
    fits = gates.shape == (len(qkv), 2 * heads) and gates.stride(1) == 1
    require(fits, "gates", gates, f"must be [{len(qkv)}, {2 * heads}]")
    require(decay.shape == (2, heads), "decay", decay, f"must be [2, {heads}]")
    _check_states(states, states.shape[1:], torch.float32)


@op("gated_delta")
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `RMSNorm(x) * weight * silu(gate)` over each head, computed in float32: [T, H E].

    x  [T, H E]; gate  [T, H E], rows may have any stride; weight  [E]
    """
    require(gate.shape == x.shape and gate.stride(1) == 1, "gate", gate, f"must have the shape of x, {list(x.shape)}")
    require(x.shape[1] % len(weight) == 0, "weight", weight, f"must divide the rows of x {list(x.shape)}")


@op("gated_delta")
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
    """Do causal_conv_ of x, gated_delta_ and gated_rms_norm with gate z: [T, Hv Ev].

    inputs, sums     the states of causal_conv_ and gated_delta_, updated in place
    batch_invariant  a token is bitwise identical in any batch and any chunk of its prompt, as in the three ops
    x, z and gates may have rows of any stride. A GPU with clusters does rows of one token, if they are all or
    `num_decoding`, in one launch: bitwise the same as the three ops. The rule of other rows in 16 bits is computed in
    chunks of 32 tokens, whose rounding depends on where a step begins in a prompt.
    """
    heads, key_size, value_size = sums.shape[1:]
    channels, taps = layer.taps.shape
    keys = channels - heads * value_size
    require(keys > 0 and keys % (2 * key_size) == 0, "taps", layer.taps, f"do not fit states {list(sums.shape)}")
    for name, tensor, width in (("x", x, channels), ("z", z, heads * value_size), ("gates", gates, 2 * heads)):
        fits = tensor.shape == (len(x), width) and tensor.stride(1) == 1
        require(fits, name, tensor, f"must be [{len(x)}, {width}]")
    require(layer.decay.shape == (2, heads), "decay", layer.decay, f"must be [2, {heads}]")
    require(layer.norm.shape == (value_size,), "norm", layer.norm, f"must be [{value_size}]")
    _check_states(inputs, (taps - 1, channels), x.dtype)
    _check_states(sums, sums.shape[1:], torch.float32)


def _check_states(states: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fits = states.shape[1:] == shape and states.dtype == dtype and states.is_contiguous()
    require(fits, "states", states, f"must be [N, {', '.join(map(str, shape))}] {dtype}, contiguous")
