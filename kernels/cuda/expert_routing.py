"""Launches of the router: the choice of experts by their logits, and norm, logits and choice of few tokens together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import Scoring
from . import gemm
from .elementwise import rms_norm
from .kernel_launch import MAX_THREADS, VECTOR_BYTES, c_name, kept_zeros, kernel, optional

MAX_TOKENS = 8  # ROWS of route_tokens.cu
COLUMNS, WARPS, MAX_CHUNKS = 64, 8, 14  # columns of a chunk there, warps that share a row, and chunks of a warp
MAX_CHUNKS_ALONE = 6  # of a warp, if one block has all rows


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
    tokens, num_experts = len(logits), logits.shape[1] - has_shared
    expert_ids = torch.empty(tokens, count + has_shared, dtype=torch.int64, device=logits.device)
    scores = torch.empty(tokens, count + has_shared, dtype=torch.float32, device=logits.device)
    if tokens:
        instance = ", ".join(_instance(logits, num_experts, normalized, scoring))
        launch = kernel("experts.cu", f"select_experts<{instance}>", early=True)
        stride = num_experts if bias is not None and bias.dim() > 1 else 0
        biases = optional(logit_bias), optional(None if bias is None else bias.contiguous()), np.int32(stride)
        sizes = map(np.int32, (tokens, num_experts, count, first_expert, has_shared))
        factors = np.float32(least_sum), np.float32(scaling)
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        inputs = logits, np.int64(logits.stride(0)), *biases
        launch((-(-tokens // 8), 1), MAX_THREADS, expert_ids, scores, *inputs, *factors, *sizes)
    return expert_ids, scores


def _instance(x: Tensor, num_experts: int, normalized: bool, scoring: Scoring) -> tuple[str, ...]:
    """Return the arguments of a template: the type, the experts of a lane, and the rules of the choice."""
    per_lane = next(n for n in (1, 2, 4, 8, 16) if 32 * n >= num_experts)
    return c_name(x), str(per_lane), str(normalized).lower(), str(scoring == "sigmoid").lower()


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
    rows = len(weight) - num_padding
    if not _takes(x, weight, norm) or batch_invariant:
        x = x if norm is None else rms_norm(x, norm, eps)
        logits = gemm.linear(x, weight, batch_invariant=batch_invariant)[:, :rows]
        rules: Any = {"logit_bias": logit_bias, "bias": bias, "least_sum": least_sum, "scaling": scaling}
        chosen = select_experts(
            logits,
            count,
            normalized=normalized,
            scoring=scoring,
            first_expert=first_expert,
            has_shared=has_shared,
            **rules,
        )
        return x, *chosen
    (tokens, size), num_experts = x.shape, rows - has_shared
    expert_ids = torch.empty(tokens, count + has_shared, dtype=torch.int64, device=x.device)
    scores, logits = (torch.empty(tokens, n, dtype=torch.float32, device=x.device) for n in (count + has_shared, rows))
    normed = x if norm is None else torch.empty_like(x)
    shared_bytes = (tokens + 1) * (-(-size // COLUMNS) * COLUMNS + 32) * x.element_size()
    chunks = -(-size // (WARPS * COLUMNS))
    kind, *rules = _instance(x, num_experts, normalized, scoring)
    # One block with all rows exchanges no logits; more weights for a lane do not fit into registers.
    groups = 2 if rows <= 32 and chunks <= MAX_CHUNKS_ALONE else 1
    by_logits = bias is None and count + has_shared <= 32  # choose_by_logits of expert_choice.cuh
    name = f"route_tokens<{', '.join((kind, str(chunks), *rules, str(by_logits).lower(), str(groups)))}>"
    launch = kernel("route_tokens.cu", name, shared_bytes=shared_bytes, early=True)
    results = expert_ids, scores, normed, logits, _counter(x.device)
    inputs = x, optional(norm), np.float32(eps), weight, optional(logit_bias), optional(bias)
    sizes = map(np.int32, (tokens, size, num_experts, count, first_expert, has_shared))
    launch(
        (-(-rows // (16 * groups)), 1),
        32 * WARPS * groups,
        *results,
        *inputs,
        np.float32(least_sum),
        np.float32(scaling),
        *sizes,
    )
    return normed, expert_ids, scores


def _takes(x: Tensor, weight: Tensor, norm: Tensor | None) -> bool:
    """Return whether the kernel route_tokens takes these tensors."""
    tensors = [x, weight] if norm is None else [x, weight, norm]
    alike = all(t.dtype == x.dtype and t.is_contiguous() and t.data_ptr() % VECTOR_BYTES == 0 for t in tensors)
    half = x.dtype in (torch.bfloat16, torch.float16)
    few = 0 < len(x) <= MAX_TOKENS and x.shape[1] <= MAX_CHUNKS * WARPS * COLUMNS
    return alike and half and few and x.shape[1] % 8 == 0 and len(weight) <= 512


def _counter(device: torch.device) -> Tensor:
    """Return the blocks that have ended; the last block sets it to zero again."""
    return kept_zeros("route_tokens", 1, device)
