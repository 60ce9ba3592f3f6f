"""FlashInfer's wrapper for paged prefill in plain torch, for tests of its use on a CPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256)  # for which FlashInfer has kernels


class StandInPrefill:
    """BatchPrefillWithPagedKVCacheWrapper: causal attention of the last tokens of each row over the row's pages."""

    def __init__(self, workspace: Tensor, *, backend: str) -> None:
        assert backend in ("fa2", "fa3")

    def plan(
        self,
        query_starts: Tensor,
        page_starts: Tensor,
        pages: Tensor,
        last_lengths: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        assert head_dim in HEAD_DIMS
        assert options["causal"]
        self.rows = list(zip(query_starts.tolist(), query_starts.tolist()[1:], last_lengths.tolist(), strict=False))
        self.pages = [pages[a:b].long() for a, b in zip(page_starts.tolist(), page_starts.tolist()[1:], strict=False)]
        self.shape, self.page_size, self.options = (num_heads, head_dim), page_size, options

    def run(
        self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor | None = None, return_lse: bool = False
    ) -> Any:
        assert q.shape[1:] == self.shape
        assert all(part.stride(-1) == 1 and part.shape[-1] == self.shape[1] for part in cache)
        outputs, sums = [], []
        for (start, stop, last), pages in zip(self.rows, self.pages, strict=True):
            length = (len(pages) - 1) * self.page_size + last
            attended, lse = self._attend(q[start:stop], *(part[pages].flatten(0, 1)[:length] for part in cache))
            outputs.append(attended)
            sums.append(lse)
        result = torch.cat(outputs).to(q.dtype)
        result = result if out is None else out.copy_(result)
        return (result, torch.cat(sums) / math.log(2)) if return_lse else result

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhe,khe->qhk", q.float(), keys) * self.options["sm_scale"]
        if cap := self.options["logits_soft_cap"]:
            scores = (scores / cap).tanh() * cap
        positions = torch.arange(len(keys) - len(q), len(keys))[:, None]
        distance = positions - torch.arange(len(keys))
        visible = (distance >= 0) & ((distance <= self.options["window_left"]) | (self.options["window_left"] < 0))
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        return torch.einsum("qhk,khe->qhe", scores.softmax(-1), values), scores.logsumexp(-1)


@contextmanager
def flashinfer_stand_in() -> Iterator[None]:
    """Let the FlashInfer backend be imported and run on a CPU."""
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.prefill")
    module.BatchPrefillWithPagedKVCacheWrapper = StandInPrefill  # type: ignore[attr-defined]
    with (
        mock.patch.dict(sys.modules, {"flashinfer": package, "flashinfer.prefill": module}),
        mock.patch("torch.cuda.Event"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        yield
