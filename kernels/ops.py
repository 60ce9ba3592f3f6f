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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`x @ weight^T + bias` with what comes before and after it: a norm of x, SiLU * up, the residual; returns [T, F].

    x       [T, D]
    weight  [F, D]; [2 F, D] if gated: rows of gate, then of up, and the result is `silu(gate) * up`
    bias    [F], or [2 F]
    norm    [D]     weight of an RMSNorm of x with `eps`, before the product
    add_to  [T, F]  takes the sum of itself and the product in place, and is returned; not together with gated
    out     [T, F]  takes the product, and is returned; not together with gated or add_to
    On a GPU up to 8 rows are one kernel that reads the weight at the memory's speed, and a row's result has the same
    bits in any of these batches. If batch_invariant, it has the same bits in all batches, more slowly; that takes
    bfloat16 or float16, and weight rows of whole 16-byte vectors.
    """
    features = len(weight) // 2 if gated else len(weight)
    _require(x.dim() == 2 and x.shape[1] == weight.shape[1], "x", x, f"must be [T, {weight.shape[1]}]")
    _require(norm is None or norm.shape == x.shape[1:], "x", x, "must have as many columns as the norm's weight")
    for name, into in (("add_to", add_to), ("out", out)):
        if into is not None:
            fits = into.shape == (len(x), features) and into.dtype == x.dtype and into.is_contiguous()
            alone = not gated and (add_to is None or out is None)
            rule = f"must be [{len(x)}, {features}] {x.dtype}, contiguous, not gated, and alone"
            _require(fits and alone, name, into, rule)
    if batch_invariant and x.is_cuda:
        whole = weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()
        half = x.dtype in (torch.bfloat16, torch.float16)
        _require(whole and half, "weight", weight, "must have rows of whole, aligned 16-byte vectors of 16-bit floats")
    options = {
        "norm": norm,
        "eps": eps,
        "gated": gated,
        "add_to": add_to,
        "out": out,
        "batch_invariant": batch_invariant,
    }
    return _on(x).linear(x, weight, bias, **options)


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


def split_keys(positions: Tensor, kv_heads: int, window: int | None, part: int | None = None) -> Tensor:
    """How `decode_attention` divides its keys among the blocks of a GPU; int32, made once a step for all its layers.

    positions [B] int32: as for decode_attention, with the same window and part. Launches no copy and waits for nothing.
    """
    _require(positions.dim() == 1 and positions.dtype == torch.int32, "positions", positions, "must be [B] int32")
    return _on(positions).split_keys(positions, kv_heads, window, part)


def decode_attention(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    pages: Tensor,
    owners: Tensor,
    splits: Tensor,
    scale: float,
    window: int | None,
    part: int | None = None,
) -> Tensor:
    """`rotate_and_store_` of one new token a row, then its attention over the row's pages; returns [B, H E].

    qkv ... slots  as for rotate_and_store_, with B rows
    pages          [R, P] int32: row `owners[b]` has the pages of row b in order, for positions before `positions[b]`
    owners         [B] int32
    splits         from split_keys with these positions, this window and this part
    window         a query at position p sees the keys p - window < j <= p; None: all j <= p
    part           a row's keys are divided every so many, so that it has the same bits in any batch; it may see PARTS
                   times as many. None: as the GPU is used best; rounding then depends on the other rows
    Heads of 64 or 128 elements in bfloat16 or float16 on a GPU; any on a CPU. With a part, rows may be tokens of one
    request whose keys, of those before, are in the cache already.
    """
    _require(qkv.dim() == 2 and qkv.is_contiguous(), "qkv", qkv, "must be [B, (H + 2 Hkv) E], contiguous")
    _require(pages.dim() == 2 and pages.dtype == torch.int32, "pages", pages, "must be [R, P] int32")
    for name, tensor in (("positions", positions), ("slots", slots), ("owners", owners)):
        _require(
            tensor.shape == qkv.shape[:1] and tensor.dtype == torch.int32, name, tensor, f"must be [{len(qkv)}] int32"
        )
    inputs = qkv, q_norm, k_norm, eps, positions, cos_sin, k_cache, v_cache, slots, pages, owners, splits
    return _on(qkv).decode_attention(*inputs, scale, window, part)


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(x[:, :I]) * x[:, I:]`, computed in float32; x [T, 2 I] -> [T, I] in x's dtype."""
    _require(x.shape[-1] % 2 == 0, "x", x, "must be [T, 2 I]")
    return _on(x).silu_and_mul(x)


def store_kv_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write the keys and values of T tokens into their slots: `cache[slot // page_size, slot % page_size] = row`.

    k, v              [T, Hkv, E]
    k_cache, v_cache  [pages, page_size, Hkv, E], any strides (the layout of the pool), updated in place
    slots             [T]  int32 or int64; a negative slot is skipped
    Converts to the cache's dtype; in float8_e4m3fn what is beyond 448 becomes 448.
    """
    _require(k.shape == v.shape, "v", v, f"must have the shape of k, {list(k.shape)}")
    _require(
        k_cache.shape == v_cache.shape, "v_cache", v_cache, f"must have the shape of k_cache, {list(k_cache.shape)}"
    )
    _require(k.shape[1:] == k_cache.shape[2:], "k", k, f"must be [T, {k_cache.shape[2]}, {k_cache.shape[3]}]")
    _require(slots.shape == k.shape[:1], "slots", slots, f"must be [{len(k)}], one per row of k")
    _on(k).store_kv_(k, v, k_cache, v_cache, slots)


def experts(x: Tensor, chosen: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`out[t] = sum over k of scores[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t]))`, e = chosen[t, k].

    x        [T, D]
    chosen   [T, K]      int64; a number outside [0, N) adds nothing
    scores   [T, K]      float32
    gate_up  [N, 2 I, D] rows of gate, then of up; contiguous
    down     [N, D, I]   contiguous
    Returns [T, D] in x's dtype; all sums are in float32. On a GPU, D and I fill whole vectors of 16 bytes (multiples of
    8 in bfloat16), no launch depends on what was chosen, and a token's output has the same bits alone and in any batch.
    """
    _require(gate_up.dim() == 3 and gate_up.is_contiguous(), "gate_up", gate_up, "must be [N, 2 I, D], contiguous")
    num_experts, rows, size = gate_up.shape
    fits = 2 * down.shape[-1] == rows and down.shape[:-1] == (num_experts, size) and down.is_contiguous()
    _require(fits, "down", down, f"must be [{num_experts}, {size}, {rows} / 2], contiguous")
    _require(x.dim() == 2 and x.shape[1] == size, "x", x, f"must be [T, {size}] for gate_up {list(gate_up.shape)}")
    _require(x.dtype == gate_up.dtype == down.dtype, "x", x, f"must have the dtype of the weights, {gate_up.dtype}")
    pairs = chosen.dim() == 2 and len(chosen) == len(x) and chosen.dtype == torch.int64
    _require(pairs, "chosen", chosen, f"must be [{len(x)}, K] int64")
    scored = scores.shape == chosen.shape and scores.dtype == torch.float32
    _require(scored, "scores", scores, f"must be {list(chosen.shape)} float32")
    for name, tensor in (("x", x), ("gate_up", gate_up), ("down", down)):
        whole = tensor.shape[-1] * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
        _require(whole or not tensor.is_cuda, name, tensor, "must have rows of whole, aligned 16-byte vectors on a GPU")
    return _on(x).experts(x, chosen, scores, gate_up, down)


def gumbel_argmax(
    logits: Tensor, temperature: Tensor, keys: Tensor, *, first_token: int = 0, tokens: Tensor | None = None
) -> Tensor:
    """The contender of each row, [S] int64: the likeliest token where temperature is 0, else a draw from
    softmax(logits / temperature); `winners` has the token.

    logits       [S, V] float32, bfloat16 or float16, rows contiguous; V may be 0
    temperature  [S]    float32, >= 0
    keys         [S]    int64: row s draws with noise hashed from (keys[s], token) alone
    first_token  column v is token first_token + v, unless
    tokens       [S, V] int32 names the token of each column
    The draw is a race: token v wins with the least E(v) / p(v), E exponential. Score and token are one integer, greater
    for a greater score and then for a lesser token: the winner among parts of a vocabulary is the greatest contender.
    """
    _check_logits(logits)
    rows = logits.shape[:1]
    _require(
        temperature.shape == rows and temperature.dtype == torch.float32, "temperature", temperature, "must be [S]"
    )
    _require(keys.shape == rows and keys.dtype == torch.int64, "keys", keys, f"must be [{rows[0]}] int64")
    if tokens is not None:
        named = tokens.shape == logits.shape and tokens.dtype == torch.int32 and tokens.is_contiguous()
        _require(named, "tokens", tokens, f"must be {list(logits.shape)} int32, contiguous")
    return _on(logits).gumbel_argmax(logits, temperature, keys, first_token=first_token, tokens=tokens)


def merge_candidates(contenders: Tensor) -> Tensor:
    """The tokens [S] int32 of the greatest of each column of contenders [n, S] int64, as `race` has them."""
    _require(
        contenders.dim() == 2 and contenders.dtype == torch.int64, "contenders", contenders, "must be [n, S] int64"
    )
    return _on(contenders).merge_candidates(contenders)


def topk_candidates(logits: Tensor, count: int, *, first_token: int = 0) -> Tensor:
    """The `count` greatest of each row as contenders, [S, count] int64, descending; count <= 128.

    logits  [S, V] as for `race`, or contenders themselves, int64, no two alike; where V is less than count, the rest is
            the least integer, which is nobody's
    """
    _require(1 <= count <= 128, "count", torch.tensor(count), "must be 1 to 128")
    if logits.dtype != torch.int64:
        _check_logits(logits)
    return _on(logits).topk_candidates(logits, count, first_token=first_token)


def sample_topk(
    contenders: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> Tensor:
    """A token for each row, [S] int32, drawn as by `race` among those that `cut` leaves.

    contenders    [S, C] int64 of logits, descending, as `best` has them; C <= 128
    temperature   [S] float32, > 0: logits are divided by it
    top_k         [S] int64, 0 for all; top_p, min_p [S] float32
    keys          [S] int64
    """
    fits = contenders.dim() == 2 and contenders.dtype == torch.int64 and 1 <= contenders.shape[1] <= 128
    _require(fits, "contenders", contenders, "must be [S, 1 to 128] int64")
    _check_rows(len(contenders), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, keys=keys)
    return _on(contenders).sample_topk(contenders, temperature, top_k, top_p, min_p, keys)


def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    """A token for each row, [S] int32, drawn as by `race` among those of the whole row that min-p, then top-p leave.

    logits [S, V] as for `race`; temperature, top_p, min_p and keys [S] as for `draw`. (Holtzman et al., 2020)
    """
    _check_logits(logits)
    _check_rows(len(logits), temperature=temperature, top_p=top_p, min_p=min_p, keys=keys)
    return _on(logits).sample_top_p(logits, temperature, top_p, min_p, keys)


def mask_top_k_top_p(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`ordered` with -inf for what min-p, then top-k, then top-p of what these left, exclude.

    ordered       [S, C] float32: logits over the temperature, descending
    top_k         [S] int64, 0 for all; top_p, min_p [S] float32: 1 and 0 for all
    """
    return _on(ordered).mask_top_k_top_p(ordered, top_k, top_p, min_p)


def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    """The tokens of a decode step, `tokens[slots, positions]`, [B] int32; the pages of these positions go into `pages`.

    tokens                      [R, L] int32: the tokens of each slot
    pages                       [R, P] int32: the pages of each slot, updated in place at positions // page_size
    slots, positions, kv_slots  [B] int32; kv_slots // page_size is the page, a negative one changes nothing
    """
    for name, tensor in (("slots", slots), ("positions", positions), ("kv_slots", kv_slots)):
        _require(tensor.shape == slots.shape and tensor.dtype == torch.int32, name, tensor, "must be [B] int32")
    return _on(tokens).begin_decode_(tokens, pages, slots, positions, kv_slots, page_size)


def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, chosen: Tensor) -> None:
    """`tokens[slots, positions + 1] = chosen`; tokens [R, L], updated in place, and the others [B], all int32."""
    for name, tensor in (("slots", slots), ("positions", positions), ("chosen", chosen)):
        _require(tensor.shape == slots.shape and tensor.dtype == torch.int32, name, tensor, "must be [B] int32")
    _on(tokens).append_tokens_(tokens, slots, positions, chosen)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements of `a` and `b` are equal; both 1-D int32, contiguous, on the host."""
    compare = jit.radix_compare()
    if compare is None:
        return reference.common_prefix_length(a, b)
    return compare(a, b)


def _check_logits(logits: Tensor) -> None:
    _require(logits.dim() == 2 and logits.is_floating_point(), "logits", logits, "must be [S, V], floating point")


def _check_rows(rows: int, **given: Tensor) -> None:
    """What each row of a batch has of its own for sampling: floats, and integers for `keys` and `top_k`."""
    for name, tensor in given.items():
        dtype = torch.int64 if name in ("keys", "top_k") else torch.float32
        fits = tensor.shape == (rows,) and tensor.dtype == dtype and tensor.is_contiguous()
        _require(fits, name, tensor, f"must be [{rows}] {dtype}")


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
