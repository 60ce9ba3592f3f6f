"""The ops of a decoder step: the contract of each op and the check of its arguments.

Every op on tensors exists three times under one name and one signature, which a test compares:

    ops.py        what it computes, and what its arguments must be; call this one. Also state_ops.py and expert_ops.py
    reference.py  its definition in plain torch, for tensors on a CPU. Also state_reference.py
    cuda/         its kernels, for tensors on a GPU

`@op(module)` makes the public function from the check; `module` is a file of cuda/. A trailing underscore means that an
argument is updated in place. Argument errors are ValueErrors that name the tensor and the rule. Shapes: T tokens, B
rows with one token each, S sampled rows, D hidden size, H query heads, Hkv KV heads, E head size, I intermediate
size, V rows of a vocabulary shard.
"""

# mypy: disable-error-code="return"

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from . import native, reference
from .argument_checks import (
    check_batch_invariant,
    check_fp8,
    check_heads,
    check_int32,
    check_linear,
    check_logits,
    check_rotary,
    check_rows,
    refuse,
    require,
)
from .arguments import (
    FP8Weight,
    KeyPartition,
    KVCache,
    Matrix,
    Pages,
    QKNorm,
    Rope,
    Rows,
)

F = TypeVar("F", bound=Callable[..., Any])


def op(module: str) -> Callable[[F], F]:
    """Make an op of its check: check, then call that name in this module of cuda/ or, on a CPU, in reference.py."""

    def decorate(check: F) -> F:
        @functools.wraps(check)
        def run(*args: Any, **options: Any) -> Any:
            check(*args, **options)
            implementations = _cuda(module) if args[0].is_cuda else reference
            return getattr(implementations, check.__name__)(*args, **options)

        return cast(F, run)

    return decorate


@op("elementwise")
def gather_rows(weight: Tensor, ids: Tensor, *, first_row: int = 0) -> Tensor:
    """Return `out[t] = weight[ids[t] - first_row]`, or zero if that row is not in `weight`: [T, D].

    weight  [V, D]  one rank's rows of the embedding
    ids     [T]     int32 or int64, on the same device
    Summing `out` over the ranks of a vocabulary-parallel embedding gives the full lookup.
    """
    require(weight.dim() == 2, "weight", weight, "must be [V, D]")
    require(ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64), "ids", ids, "must be [T], int32 or int64")


@op("elementwise")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, in x's dtype.

    x  [..., D]; weight  [D]
    """
    if weight.shape != x.shape[-1:]:
        refuse("weight", weight, f"must be [{x.shape[-1]}] for x {list(x.shape)}")


@op("elementwise")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `residual += x`; return the RMSNorm of that sum (unrounded, float32) in x's dtype: [T, D].

    x, residual  [T, D], same shape and dtype; residual is updated in place
    weight       [D]
    """
    if residual.shape != x.shape:
        refuse("residual", residual, f"must have the shape of x, {list(x.shape)}")
    if weight.shape != x.shape[-1:]:
        refuse("weight", weight, f"must be [{x.shape[-1]}] for x {list(x.shape)}")


@op("gemm")
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
    """Return `x @ weight^T + bias`, [T, F], fused with a norm of x before it, and `silu(gate) * up` or a sum after it.

    x       [T, D]; FP8Rows only where a kernel has made them for this weight
    weight  [F, D]; [2 F, D] if gated: rows of gate, then of up, and the result is `silu(gate) * up`
    bias    [F], or [2 F]
    norm    [D]     weight of an RMSNorm of x with `eps`, before the GEMM
    add_to  [T, F]  the result is added in place, and this is returned; not together with gated
    out     [T, F]  receives the result, and is returned; not together with gated or add_to
    On a GPU up to 8 rows are one kernel that reads the weight at the memory's speed. With batch_invariant (set by
    --deterministic) a row's result is bitwise identical in any batch, but slower; x must be bfloat16 or float16, and
    weight rows must be whole 16-byte vectors.
    """
    check_linear(x, weight, norm, add_to, out, gated=gated)
    if batch_invariant and isinstance(x, Tensor) and x.is_cuda:
        check_batch_invariant(x, weight)


@op("gemm")
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
    """Do `linear` with `gated`, for the linear layer of the weight `feeds` [G, F] that alone takes the result.

    So the result may be FP8Rows: then the next layer needs no kernel that quantizes.
    """
    check_linear(x, weight, norm, None, None, gated=True)
    if batch_invariant and x.is_cuda:
        check_batch_invariant(x, weight)
    if 2 * feeds.shape[-1] != weight.shape[0]:
        refuse("feeds", feeds.data, f"must have {weight.shape[0] // 2} columns")


@op("scaled_gemm")
def has_two_fp8_gemms(x: Tensor, weight: FP8Weight) -> bool:
    """Return whether `linear` of more than 8 such rows has two GEMMs, between which `weight.choice` chooses."""
    check_fp8("weight", weight)


@op("paged_attention")
def rotate_and_store_(qkv: Tensor, norm: QKNorm, rope: Rope, cache: KVCache, kv_slots: Tensor) -> Tensor:
    """Norm and rotate q and k, store k and v in the cache, and return q: [T, H, E].

    qkv       [T, (H + 2 Hkv) E]  heads of q, then k, then v; contiguous
    rope      with positions of all T tokens
    cache     updated in place at [slot // page_size, slot % page_size]
    kv_slots  [T]  int32 or int64; a negative slot is skipped
    Computed in float32, rounded once. Converts k and v to the cache's dtype; float8_e4m3fn saturates at 448.
    """
    kv_heads, head_dim = cache.k.shape[2:]
    if cache.k.shape != cache.v.shape:
        refuse("v_cache", cache.v, f"must have the shape of k_cache, {list(cache.k.shape)}")
    check_heads(qkv)
    if qkv.shape[1] % head_dim:
        refuse("qkv", qkv, f"must have heads of size {head_dim}")
    require(qkv.shape[1] > 2 * kv_heads * head_dim, "qkv", qkv, "must have heads of q, k and v")
    check_rotary(rope, head_dim)
    for name, tensor in (("positions", rope.positions), ("kv_slots", kv_slots)):
        if tensor.shape != qkv.shape[:1]:
            refuse(name, tensor, f"must be {list(qkv.shape[:1])}, one per row of qkv")


@op("paged_attention")
def partition_keys(
    positions: Tensor, table_rows: Tensor, groups: int, window: int | None, kv_chunk: int | None = None
) -> KeyPartition:
    """Return how `decode_attention` divides its keys among the thread blocks of a GPU, for all layers of a step.

    positions         [B] int32, as for decode_attention
    table_rows        [B] int32, of its pages
    groups            num_groups(H, Hkv)
    window, kv_chunk  see KeyPartition
    Launches no copy and does not wait for the device.
    """
    check_int32(positions.shape, positions=positions, table_rows=table_rows)


@op("paged_attention")
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
    """Do `rotate_and_store_` for one new token per row; return its attention over the pages of the row: [B, H E].

    qkv, norm, rope, cache, kv_slots  as for rotate_and_store_, with B rows; positions and kv_slots are int32
    pages      the pages of the keys at positions before `rope.positions[b]`
    partition  from partition_keys with these positions
    scale      factor of the scores, before the softmax
    softcap    the scores are then bounded to `softcap * tanh(score / softcap)`
    sinks      [H]  a score of each query head that takes part in the softmax and has no value
    out        [B, H E]  receives the result, and is returned; contiguous
    feeds      the weight of the linear layer that alone takes the result: it may be FP8Rows without `out`
    The cache has qkv's dtype, or float8_e4m3fn. On a GPU heads of 64, 96, 128 or 256 elements in bfloat16 or float16,
    with R a multiple of 4, of 8 for 256; any on a CPU. If the partition has a kv_chunk, rows may be tokens of one
    request, provided that their keys are in the cache already.
    """
    check_heads(qkv, multiple=16)
    check_rotary(rope, cache.k.shape[-1])
    if sinks is not None:
        heads = qkv.shape[1] // cache.k.shape[-1] - 2 * cache.k.shape[-2]
        require(sinks.shape == (heads,) and sinks.dtype == qkv.dtype, "sinks", sinks, f"must be [{heads}] {qkv.dtype}")
    if out is not None:
        columns = qkv.shape[1] - 2 * cache.k.shape[-2] * cache.k.shape[-1]
        fits = out.shape == (len(qkv), columns) and out.dtype == qkv.dtype and out.is_contiguous()
        require(fits, "out", out, f"must be [{len(qkv)}, {columns}] {qkv.dtype}, contiguous")
    for weight in norm[:2]:
        if weight is not None:
            require(weight.data_ptr() % 16 == 0, "norm", weight, "must begin at a multiple of 16 bytes")
    table, rows = pages.table, qkv.shape[:1]
    require(table.dim() == 2 and table.dtype == torch.int32, "pages", table, "must be [R, P] int32")
    check_int32(rows, positions=rope.positions, kv_slots=kv_slots, table_rows=pages.table_rows)


@op("elementwise")
def silu_and_mul(x: Tensor) -> Tensor:
    """Return `silu(x[:, :I]) * x[:, I:]`, computed in float32; x [T, 2 I] -> [T, I] in x's dtype."""
    require(x.shape[-1] % 2 == 0, "x", x, "must be [T, 2 I]")


@op("elementwise")
def gelu_and_mul(x: Tensor) -> Tensor:
    """Do `silu_and_mul` with GELU, in its tanh form, in place of SiLU."""
    require(x.shape[-1] % 2 == 0, "x", x, "must be [T, 2 I]")


@op("elementwise")
def multiply_by_sigmoid_(x: Tensor, gate: Tensor) -> Tensor:
    """Multiply x [T, I] by `sigmoid(gate)` in place, in float32, and return it; rows of gate may have any stride."""
    require(gate.shape == x.shape and gate.stride(1) == 1, "gate", gate, f"must have the shape of x, {list(x.shape)}")


@op("token_sampling")
def gumbel_argmax(
    logits: Tensor, temperature: Tensor, keys: Tensor, *, first_token: int = 0, tokens: Tensor | None = None
) -> Tensor:
    """Return one candidate per row, [S] int64: the likeliest token, or a sample from softmax(logits / temperature).

    logits       [S, V] float32, bfloat16 or float16, rows contiguous; V may be 0
    temperature  [S]    float32, >= 0; 0 takes the likeliest token
    keys         [S]    int64: the noise of row s is hashed from (keys[s], token) alone
    first_token  column v is token first_token + v, unless
    tokens       [S, V] int32 gives the token of each column
    The Gumbel-max trick: the sample is `argmax(log p(v) - log E(v))`, E exponential. A candidate is score and token in
    one integer, greater for a greater score and then for a lesser token. So the sample from a vocabulary in parts is
    the greatest candidate of the parts; `merge_candidates` returns its token.
    """
    check_logits(logits)
    rows = logits.shape[:1]
    fits = temperature.shape == rows and temperature.dtype == torch.float32
    require(fits, "temperature", temperature, "must be [S]")
    require(keys.shape == rows and keys.dtype == torch.int64, "keys", keys, f"must be [{rows[0]}] int64")
    if tokens is not None:
        fits = tokens.shape == logits.shape and tokens.dtype == torch.int32 and tokens.is_contiguous()
        require(fits, "tokens", tokens, f"must be {list(logits.shape)} int32, contiguous")


@op("token_sampling")
def merge_candidates(candidates: Tensor) -> Tensor:
    """Return the token [S] int32 of the greatest of each column of candidates [n, S] int64, from `gumbel_argmax`."""
    require(candidates.dim() == 2 and candidates.dtype == torch.int64, "candidates", candidates, "must be [n, S] int64")


@op("token_sampling")
def topk_candidates(logits: Tensor, count: int, *, first_token: int = 0) -> Tensor:
    """Return the `count` greatest of each row as candidates, [S, count] int64, descending; count <= 128.

    logits  [S, V] as for `gumbel_argmax`, or candidates, int64, all different; if V is less than count, the rest is the
            least integer, which is no candidate
    """
    require(1 <= count <= 128, "count", torch.tensor(count), "must be 1 to 128")
    if logits.dtype != torch.int64:
        check_logits(logits)


@op("token_sampling")
def sample_topk(
    candidates: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> Tensor:
    """Return a token per row, [S] int32, by Gumbel-max among the candidates that `mask_top_k_top_p` keeps.

    candidates    [S, C] int64 of logits, descending, from `topk_candidates`; C <= 128
    temperature   [S] float32, > 0: logits are divided by it
    top_k         [S] int64, 0 for all; top_p, min_p [S] float32
    keys          [S] int64
    """
    fits = candidates.dim() == 2 and candidates.dtype == torch.int64 and 1 <= candidates.shape[1] <= 128
    require(fits, "candidates", candidates, "must be [S, 1 to 128] int64")
    check_rows(len(candidates), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, keys=keys)


@op("token_sampling")
def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    """Return a token per row, [S] int32, by Gumbel-max among the tokens that min-p, then top-p keep of the whole row.

    logits  [S, V] as for `gumbel_argmax`; temperature, top_p, min_p and keys [S] as for `sample_topk`
    Nucleus sampling (Holtzman et al., 2020).
    """
    check_logits(logits)
    check_rows(len(logits), temperature=temperature, top_p=top_p, min_p=min_p, keys=keys)


@op("token_sampling")
def mask_top_k_top_p(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return `ordered` with -inf for what is excluded by min-p, then by top-k, then by top-p of the rest.

    ordered       [S, C] float32: logits divided by the temperature, descending
    top_k         [S] int64, 0 for all; top_p, min_p [S] float32: 1 and 0 for all
    """
    require(ordered.dim() == 2 and ordered.dtype == torch.float32, "ordered", ordered, "must be [S, C] float32")
    check_rows(len(ordered), top_k=top_k, top_p=top_p, min_p=min_p)


@op("elementwise")
def sum_squares(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sums of squares of two parts of each row, [T, 2] float32: `sizes[0]` elements, then `sizes[1]`.

    x  [T, D], contiguous. A row's result is bitwise identical in any batch.
    """
    require(x.dim() == 2 and x.is_contiguous() and sum(sizes) <= x.shape[1], "x", x, f"must be [T, D >= {sum(sizes)}]")


@op("elementwise")
def begin_decode_(
    tokens: Tensor, pages: Tensor, slots: Tensor, positions: Tensor, kv_slots: Tensor, page_size: int
) -> Tensor:
    """Return the tokens of a decode step, `tokens[slots, positions]`, [B] int32; enter their pages into `pages`.

    tokens                      [R, L] int32: the tokens of each slot
    pages                       [R, P] int32: the pages of each slot, updated in place at positions // page_size
    slots, positions, kv_slots  [B] int32; kv_slots // page_size is the page, a negative one changes nothing
    """
    check_int32(slots.shape, slots=slots, positions=positions, kv_slots=kv_slots)


@op("elementwise")
def append_tokens_(tokens: Tensor, slots: Tensor, positions: Tensor, new_tokens: Tensor) -> None:
    """Set `tokens[slots, positions + 1] = new_tokens`; tokens [R, L], updated in place, others [B], all int32."""
    check_int32(slots.shape, slots=slots, positions=positions, new_tokens=new_tokens)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many leading elements of `a` and `b` are equal; both 1-D int32, contiguous, on the host."""
    compare = native.prefix_compare()
    return reference.common_prefix_length(a, b) if compare is None else compare(a, b)


@functools.cache
def _cuda(module: str) -> ModuleType:
    try:
        return importlib.import_module(f".cuda.{module}", __package__)  # needs CuPy, only on machines with a GPU
    except ImportError as error:
        raise RuntimeError(
            f"tensors on a GPU need CuPy, which does not import here ({error});"
            " install lockstep[cuda12] or lockstep[cuda13]"
        ) from error
