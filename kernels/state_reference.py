"""The ops of state_ops.py in plain torch, on the terms of reference.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import DeltaLayer, StateRows


def causal_conv_(x: Tensor, weight: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    out, before = x.new_empty(x.shape), states.shape[1]
    for slot, tokens, saves in _state_rows(rows):
        inputs = torch.cat((states[slot], x[tokens])).float()  # [K - 1 + n, C]
        windows = inputs.unfold(0, before + 1, 1)  # [n, C, K]
        out[tokens] = F.silu((windows * weight.float()).sum(-1)).to(x.dtype)
        for count, saved in (*saves, (len(inputs) - before, slot)):
            states[saved] = inputs[count : count + before].to(states.dtype)
    return out


def gated_delta_(qkv: Tensor, gates: Tensor, decay: Tensor, states: Tensor, rows: StateRows) -> Tensor:
    heads, key_size, value_size = states.shape[1:]
    q, k, v = (x.unflatten(1, (-1, size)) for x, size in _split_qkv(qkv.float(), heads, key_size, value_size))
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q * 1.0, k))
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q * key_size**-0.5, k))  # [T, Hv, E]
    b, a = gates.float().chunk(2, dim=1)
    beta = b.sigmoid()
    factor = (-decay[0].float().exp() * F.softplus(a + decay[1].float())).exp()  # [T, Hv]
    out = torch.empty_like(v)
    for slot, tokens, saves in _state_rows(rows):
        state = states[slot].clone()
        for count, t in enumerate(range(tokens.start, tokens.stop), start=1):
            state *= factor[t, :, None, None]
            delta = beta[t, :, None] * (v[t] - (k[t, :, :, None] * state).sum(1))  # [Hv, Ev]
            state += k[t, :, :, None] * delta[:, None]
            out[t] = (q[t, :, :, None] * state).sum(1)
            for at, saved in saves:
                if at == count:
                    states[saved] = state
        states[slot] = state
    return out.flatten(1).to(qkv.dtype)


def _split_qkv(qkv: Tensor, heads: int, key_size: int, value_size: int) -> list[tuple[Tensor, int]]:
    """Return q, k and v, and the size of a head of each."""
    keys = (qkv.shape[1] - heads * value_size) // 2
    q, k, v = qkv.split([keys, keys, heads * value_size], dim=1)
    return [(q, key_size), (k, key_size), (v, value_size)]


def _state_rows(rows: StateRows) -> Iterator[tuple[int, slice, list[tuple[int, int]]]]:
    """Yield the state, the tokens and the saves of each row."""
    starts = rows.starts.tolist()
    saves = [[]] * len(rows.slots) if rows.saves is None else rows.saves.tolist()
    for slot, start, stop, pairs in zip(rows.slots.tolist(), starts, starts[1:], saves, strict=False):
        yield slot, slice(start, stop), [(count, state) for count, state in pairs if count]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    heads = x.float().unflatten(1, (-1, len(weight)))
    normed: Tensor = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed.flatten(1) * F.silu(gate.float())).to(x.dtype)


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
    qkv = causal_conv_(x, layer.taps, inputs, rows)
    return gated_rms_norm(gated_delta_(qkv, gates, layer.decay, sums, rows), z, layer.norm, layer.eps)
