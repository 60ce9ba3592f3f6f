"""Every op of ops.py in plain torch: the CPU path, the oracle of the tests, and the definition of each op.

Those with a state are in state_reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    ClampedSwiGLU,
    ExpertMatrix,
    FP8Rows,
    FP8Weight,
    KeyPartition,
    KVCache,
    Matrix,
    MXFP4Weight,
    Pages,
    QKNorm,
    Rope,
    Rows,
    Scoring,
)
from .random_noise import exponential_noise
from .state_reference import causal_conv_ as causal_conv_
from .state_reference import delta_net_ as delta_net_
from .state_reference import gated_delta_ as gated_delta_
from .state_reference import gated_rms_norm as gated_rms_norm

FP8_MAX = 448.0  # the maximum of float8_e4m3fn
NO_CANDIDATE = torch.iinfo(torch.int64).min  # less than any candidate


def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    local = ids - first_row
    owned = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(torch.where(owned, local, 0), weight)
    return rows * owned.unsqueeze(-1).to(rows.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    total = x.float() + residual.float()
    residual.copy_(total)
    return rms_norm(total, weight, eps).to(x.dtype)


def linear(
    x: Rows,
    weight: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    if isinstance(x, FP8Rows):
        x = x.dequantized()
    if norm is not None:
        x = rms_norm(x, norm, eps)
    product = F.linear(x, weight.dequantized(x.dtype) if isinstance(weight, FP8Weight) else weight, bias)
    if gated:
        product = silu_and_mul(product)
    if add_to is not None:
        return add_to.add_(product)
    return product if out is None else out.copy_(product)


def gated_linear(
    x: Tensor,
    weight: Matrix,
    feeds: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    batch_invariant: bool = False,
) -> Rows:
    return linear(x, weight, bias, norm=norm, eps=eps, gated=True, batch_invariant=batch_invariant)


def has_two_fp8_gemms(x: Tensor, weight: FP8Weight) -> bool:
    return False  # weights are dequantized


def rotate_and_store_(qkv: Tensor, norm: QKNorm, rope: Rope, cache: KVCache, kv_slots: Tensor) -> Tensor:
    q, k, v = _prepare_heads(qkv, norm, rope, cache)
    _store_kv(k, v, cache, kv_slots)
    return q


def _prepare_heads(qkv: Tensor, norm: QKNorm, rope: Rope, cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [T, H, E], k and v [T, Hkv, E] with norm and rotation."""
    kv_heads, head_dim = cache.k.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))  # [T, H + 2 Hkv, E]
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    q, k = _norm_and_rotate(q.float(), norm.q, norm.eps, rope), _norm_and_rotate(k.float(), norm.k, norm.eps, rope)
    return q.to(qkv.dtype), k.to(qkv.dtype), v


def _norm_and_rotate(x: Tensor, norm: Tensor | None, eps: float, rope: Rope) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if len(rope.cos_sin) == 0:
        return x
    rotary = rope.cos_sin.shape[1]
    cos, sin = rope.cos_sin[rope.positions.long()].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, R/2] each
    first, second = x[..., :rotary].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., rotary:]), dim=-1)


def _store_kv(k: Tensor, v: Tensor, cache: KVCache, kv_slots: Tensor) -> None:
    if (kv_slots < 0).any():
        kept = kv_slots >= 0
        k, v, kv_slots = k[kept], v[kept], kv_slots[kept]
    page_size = cache.k.shape[1]
    places = (kv_slots.long() // page_size, kv_slots.long() % page_size)
    for target, rows in ((cache.k, k), (cache.v, v)):
        if target.dtype == torch.float8_e4m3fn:  # torch turns values that are too large into NaN, and cannot index it
            stored = rows.float().clamp(-FP8_MAX, FP8_MAX).to(target.dtype)
            target.view(torch.uint8).index_put_(places, stored.view(torch.uint8))
        else:
            target.index_put_(places, rows.to(target.dtype))


def partition_keys(
    positions: Tensor, table_rows: Tensor, groups: int, window: int | None, kv_chunk: int | None = None
) -> KeyPartition:
    return KeyPartition(positions.new_zeros(0), window, kv_chunk)  # decode_attention goes row by row


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
    q, k, v = _prepare_heads(qkv, norm, rope, cache)
    _store_kv(k, v, cache, kv_slots)
    attended, page_size, window = torch.empty_like(q), cache.k.shape[1], partition.window
    for row, position in enumerate(rope.positions.tolist()):
        first = 0 if window is None else max(0, position + 1 - window)
        old = torch.arange(first, position, device=q.device)
        places = pages.table[pages.table_rows[row].long(), old // page_size].long(), old % page_size
        keys = torch.cat((cache.k[places].to(q.dtype), k[row : row + 1])).transpose(0, 1)  # [Hkv, K, E]
        values = torch.cat((cache.v[places].to(q.dtype), v[row : row + 1])).transpose(0, 1)
        attended[row] = _attend(q[row], keys, values, scale, softcap, sinks)
    return attended.flatten(1) if out is None else out.copy_(attended.flatten(1))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return attention of one query per head, q [H, E], over keys and values [Hkv, K, E]: [H, E]."""
    if softcap is None and sinks is None:
        gqa = len(q) != len(keys)
        return F.scaled_dot_product_attention(q[:, None], keys, values, scale=scale, enable_gqa=gqa)[:, 0]
    grouped = q.unflatten(0, (len(keys), -1))  # [Hkv, H / Hkv, E]
    scores = (grouped @ keys.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(*scores.shape[:2], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[1]].to(q.dtype)
    out: Tensor = weights @ values  # [Hkv, H / Hkv, E]
    return out.flatten(0, 1)


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def multiply_by_sigmoid_(x: Tensor, gate: Tensor) -> Tensor:
    return x.copy_(x.float() * gate.float().sigmoid())


def select_experts(
    logits: Tensor,
    count: int,
    *,
    normalized: bool,
    scoring: Scoring = "softmax",
    logit_bias: Tensor | None = None,
    bias: Tensor | None = None,
    least_sum: float = 0.0,
    scaling: float = 1.0,
    first_expert: int = 0,
    has_shared: bool = False,
) -> tuple[Tensor, Tensor]:
    logits = logits.float() if logit_bias is None else logits.float() + logit_bias.float()
    wide, gate = logits.split([logits.shape[1] - has_shared, int(has_shared)], dim=1)
    scores = wide.sigmoid() if scoring == "sigmoid" else wide.softmax(-1)
    expert_ids = (wide if bias is None else scores + bias).topk(count, dim=-1).indices
    scores = scores.gather(1, expert_ids)
    if normalized:
        scores = scores / scores.sum(-1, keepdim=True).clamp(min=least_sum)
    shared_ids = torch.full_like(gate, wide.shape[1], dtype=torch.int64)  # [T, 0] without has_shared
    return torch.cat((expert_ids, shared_ids), 1) - first_expert, torch.cat((scores * scaling, gate.sigmoid()), 1)


def route_tokens(
    x: Tensor,
    weight: Tensor,
    count: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    logit_bias: Tensor | None = None,
    normalized: bool,
    scoring: Scoring = "softmax",
    bias: Tensor | None = None,
    least_sum: float = 0.0,
    scaling: float = 1.0,
    first_expert: int = 0,
    has_shared: bool = False,
    num_padding: int = 0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x if norm is None else rms_norm(x, norm, eps)
    logits = linear(x, weight[: len(weight) - num_padding], logit_bias)
    expert_ids, scores = select_experts(
        logits,
        count,
        normalized=normalized,
        scoring=scoring,
        bias=bias,
        least_sum=least_sum,
        scaling=scaling,
        first_expert=first_expert,
        has_shared=has_shared,
    )
    return x, expert_ids, scores


def experts(
    x: Tensor,
    expert_ids: Tensor,
    scores: Tensor,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    swiglu: ClampedSwiGLU | None = None,
    add_to: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in expert_ids.unique().tolist():
        if 0 <= expert < gate_up.shape[0]:
            tokens, choice = torch.where(expert_ids == expert)
            first, second = (None if bias is None else bias[expert] for bias in (gate_up_bias, down_bias))
            product = linear(x[tokens], _expert(gate_up, expert, x.dtype), first)
            hidden = silu_and_mul(product) if swiglu is None else _clamped_swiglu(product, swiglu)  # [t, I]
            expert_out = linear(hidden, _expert(down, expert, x.dtype), second).float()
            out.index_add_(0, tokens, expert_out * scores[tokens, choice, None])
    return out.to(x.dtype) if add_to is None else add_to.copy_(out.add_(add_to))


def _expert(weights: ExpertMatrix, expert: int, dtype: torch.dtype) -> Matrix:
    if isinstance(weights, MXFP4Weight):
        return weights.expert(expert).to(dtype)
    return weights.expert(expert) if isinstance(weights, FP8Weight) else weights[expert]


def _clamped_swiglu(product: Tensor, swiglu: ClampedSwiGLU) -> Tensor:
    gate, up = product.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
    return (gate * torch.sigmoid(swiglu.alpha * gate) * (up + 1)).to(product.dtype)


def gumbel_argmax(
    logits: Tensor, temperature: Tensor, keys: Tensor, *, first_token: int = 0, tokens: Tensor | None = None
) -> Tensor:
    ids = _columns(logits, first_token) if tokens is None else tokens
    scores = logits.float()
    if temperature.any():
        random = (temperature > 0)[:, None]
        # log(p / E) up to a constant of the row.
        perturbed = logits / torch.where(random, temperature[:, None], 1) - exponential_noise(keys, ids).log()
        scores = torch.where(random, perturbed, scores)
    return _descending(_pack(scores, ids), 1)[:, 0]


def merge_candidates(candidates: Tensor) -> Tensor:
    return _unpack(candidates.amax(0))[1]


def topk_candidates(logits: Tensor, count: int, *, first_token: int = 0) -> Tensor:
    packed = logits if logits.dtype == torch.int64 else _pack(logits.float(), _columns(logits, first_token))
    return _descending(packed, count)


def sample_topk(
    candidates: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> Tensor:
    scores, tokens = _unpack(candidates)
    scores = scores.masked_fill(candidates == NO_CANDIDATE, -torch.inf)
    kept = mask_top_k_top_p(scores / temperature[:, None], top_k, top_p, min_p)
    return merge_candidates(gumbel_argmax(kept, torch.ones_like(temperature), keys, tokens=tokens)[None])


def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    ordered, ids = (logits.float() / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    kept = mask_top_k_top_p(ordered, torch.zeros_like(keys), top_p, min_p)
    return merge_candidates(gumbel_argmax(kept, torch.ones_like(temperature), keys, tokens=ids.int())[None])


def mask_top_k_top_p(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    threshold = ordered[:, :1] + min_p.log()[:, None]  # -inf without min_p
    place = torch.arange(ordered.shape[1], device=ordered.device)
    excluded = (ordered < threshold) | ((place >= top_k[:, None]) & (top_k > 0)[:, None])
    kept = ordered.masked_fill(excluded, -torch.inf)
    before = kept.softmax(-1).cumsum(-1).roll(1, dims=-1)  # the mass of more likely tokens
    before[:, 0] = 0  # the most likely token always stays
    beyond = (before >= top_p[:, None]) & (top_p < 1)[:, None]  # without top-p, rounding of the sum must not cut a tail
    return kept.masked_fill(beyond, -torch.inf)


def sum_squares(x: Tensor, sizes: Sequence[int]) -> Tensor:
    parts = x[:, : sum(sizes)].float().square().split(list(sizes), dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    stores = kv_slots >= 0
    pages[slots[stores].long(), positions[stores].long() // page_size] = kv_slots[stores] // page_size
    return tokens[slots.long(), positions.long()]


def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, new_tokens: Tensor) -> None:
    tokens[slots.long(), positions.long() + 1] = new_tokens


def _columns(logits: Tensor, first_token: int) -> Tensor:
    return torch.arange(first_token, first_token + logits.shape[1], device=logits.device)


def _pack(scores: Tensor, ids: Tensor) -> Tensor:
    """Pack scores [S, V] float32 and ids [V] or [S, V] into integers ordered by (score, -id); 0 and -0 are equal."""
    ordered = _mirror_negative((scores + 0.0).view(torch.int32)).long()
    return (ordered << 32) | (0xFFFFFFFF - ids.long())


def _unpack(candidates: Tensor) -> tuple[Tensor, Tensor]:
    scores = _mirror_negative((candidates >> 32).int()).view(torch.float32)
    return scores, (0xFFFFFFFF - (candidates & 0xFFFFFFFF)).int()


def _mirror_negative(bits: Tensor) -> Tensor:
    """Map the bits of floats, int32, to integers of the same order, or back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _descending(packed: Tensor, count: int) -> Tensor:
    missing = max(0, count - packed.shape[1])
    return F.pad(packed, (0, missing), value=NO_CANDIDATE).topk(count, dim=-1).values


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
