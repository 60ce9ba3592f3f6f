"""Launches of the sampling kernels: Gumbel-max over the vocabulary, top-k candidates, top-p without a sort."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .kernel_launch import MAX_THREADS, c_name, kernel, num_threads, vector_width

GUMBEL_BLOCKS = 1024  # enough to fill any GPU
TOPK_THREADS, TOPK_ITEMS = 128, 32  # threads per block and logits per thread; mirrors token_sampling.cu
TOP_P_THREADS = 1024  # threads of a row's one block


def gumbel_argmax(
    logits: Tensor, temperature: Tensor, keys: Tensor, *, first_token: int = 0, tokens: Tensor | None = None
) -> Tensor:
    rows, vocab = logits.shape
    candidates = keys.new_full((rows,), torch.iinfo(torch.int64).min)
    if rows and vocab:
        v = vector_width(vocab, logits, strides=[logits.stride(0)])
        parts = max(1, min(GUMBEL_BLOCKS // rows, vocab // (v * MAX_THREADS)))
        launch = kernel("token_sampling.cu", f"gumbel_argmax<{c_name(logits)}, {v}, {str(tokens is not None).lower()}>")
        ids = tokens if tokens is not None else candidates  # not read
        columns = logits, np.int64(logits.stride(0)), ids, np.int32(first_token)
        launch((rows, parts), MAX_THREADS, candidates, *columns, temperature, keys, np.int32(vocab))
    return candidates


def merge_candidates(candidates: Tensor) -> Tensor:
    ranks, rows = candidates.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=candidates.device)
    if rows:
        grid, sizes = (-(-rows // MAX_THREADS), 1), (np.int32(ranks), np.int32(rows))
        kernel("token_sampling.cu", "merge_candidates")(grid, MAX_THREADS, tokens, candidates.contiguous(), *sizes)
    return tokens


def topk_candidates(logits: Tensor, count: int, *, first_token: int = 0) -> Tensor:
    rows, columns = logits.shape
    parts = max(1, -(-columns // (TOPK_THREADS * TOPK_ITEMS)))
    # Ordered by place, then by part: in the next round each thread gets some of the greatest of every part.
    candidates = torch.empty(rows, count, parts, dtype=torch.int64, device=logits.device)
    if rows:
        v = vector_width(columns, logits, strides=[logits.stride(0)])
        shared_bytes = max(TOPK_THREADS, count * TOPK_ITEMS) * candidates.element_size()
        launch = kernel("token_sampling.cu", f"topk_candidates<{c_name(logits)}, {v}>", shared_bytes=shared_bytes)
        sizes = np.int64(logits.stride(0)), np.int32(first_token), np.int32(columns), np.int32(count)
        launch((rows, parts), TOPK_THREADS, candidates, logits, *sizes)
    return candidates[:, :, 0] if parts == 1 else topk_candidates(candidates.flatten(1), count)


def sample_topk(
    candidates: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor
) -> Tensor:
    rows, count = candidates.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=candidates.device)
    if rows:
        inputs = candidates.contiguous(), temperature, top_k, top_p, min_p, keys
        kernel("token_sampling.cu", "sample_topk")((rows, 1), num_threads(count), tokens, *inputs, np.int32(count))
    return tokens


def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, min_p: Tensor, keys: Tensor) -> Tensor:
    rows, vocab = logits.shape
    tokens = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    if rows and vocab:
        v = vector_width(vocab, logits, strides=[logits.stride(0)])
        launch = kernel("token_sampling.cu", f"sample_top_p<{c_name(logits)}, {v}>")
        inputs = logits, np.int64(logits.stride(0)), temperature, top_p, min_p, keys
        launch((rows, 1), TOP_P_THREADS, tokens, *inputs, np.int32(vocab))
    return tokens


def mask_top_k_top_p(ordered: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    return reference.mask_top_k_top_p(ordered, top_k, top_p, min_p)
