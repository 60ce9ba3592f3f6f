"""Log-probabilities of sampled tokens and of prompt tokens.

The logits of a whole prompt would be gigabytes (8,192 x 150,000 float32: 5 GB). They are therefore computed, and
gathered from the ranks, for some rows at a time. All ranks take part; only rank 0 copies results to its host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.batch import to_device
from ..model.decoder import Decoder
from ..model.norm import Residual
from ..plan import StepPlan, TokenLogprobs

ROWS_AT_ONCE = 64  # 40 MB of float32 logits for a vocabulary of 150,000
# Of n tokens: log-probability [n], rank [n], ids [n, W] and log-probabilities [n, W] of the most likely tokens.
DeviceLogprobs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities of N tokens, which the device may still be computing."""

    rows: np.ndarray  # [N] int64: the row of each token
    widths: np.ndarray  # [N] int32: most likely tokens to report for each
    chunks: list[DeviceLogprobs]

    def wait(self) -> list[tuple[int, TokenLogprobs]]:
        """Return each token's row and log-probabilities; waits for the device."""
        entries = [entry for chunk in self.chunks for entry in zip(*(t.tolist() for t in chunk), strict=True)]
        tokens = zip(self.rows.tolist(), self.widths.tolist(), entries, strict=True)
        return [(row, TokenLogprobs(value, rank, ids[:n], top[:n])) for row, n, (value, rank, ids, top) in tokens]


def sampled_logprobs(logits: Tensor, tokens: Tensor, widths: np.ndarray) -> PendingLogprobs:
    """Return the log-probabilities of sampled tokens.

    logits  [S, V] float32, as the model computed them
    tokens  [S] int32
    widths  [S] int32: most likely tokens to report; negative for rows without log-probabilities, not all of them
    """
    rows = np.flatnonzero(widths >= 0)
    index = torch.from_numpy(rows).to(logits.device)
    return PendingLogprobs(rows, widths[rows], [_device_logprobs(logits[index], tokens[index], int(widths.max()))])


def prompt_logprobs(
    decoder: Decoder, residual: Residual, tokens: Tensor, plan: StepPlan, query_starts: np.ndarray, params: np.ndarray
) -> PendingLogprobs | None:
    """Return the log-probability of each prompt token that follows one computed in this step; None if none is wanted.

    residual      the step's residual stream [T, D]
    tokens        [slots, L] int32 on the device: the tokens of each slot
    query_starts  [B + 1] int32: first token of each row in `residual`
    params        [B] PARAMS of the sampler
    """
    widths = params["prompt_logprobs"]  # most likely tokens to report; negative for rows without log-probabilities
    counts = np.where(widths >= 0, np.clip(params["num_prompt_tokens"] - 1 - plan.starts, 0, plan.counts), 0)
    if not counts.any():
        return None
    rows = np.repeat(np.arange(len(counts)), counts)
    offsets = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = query_starts[rows] + offsets, plan.slots[rows], plan.starts[rows] + offsets + 1
    chunks = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = slice(start, start + ROWS_AT_ONCE)
        hidden, slots, positions = (to_device(index[chunk].astype(np.int64), tokens.device) for index in indices)
        logits = decoder.logits(residual, hidden).gather().float()
        chunks.append(_device_logprobs(logits, tokens[slots, positions], int(widths.max())))
    return PendingLogprobs(rows, widths[rows], chunks)


def _device_logprobs(logits: Tensor, tokens: Tensor, width: int) -> DeviceLogprobs:
    """Return the log-probabilities of tokens [n] from logits [n, V] float32."""
    logprobs = logits.log_softmax(-1)
    of_tokens = logprobs.gather(1, tokens[:, None].long())
    top, ids = logprobs.topk(min(width, logits.shape[1]), dim=-1)
    return of_tokens[:, 0], (logprobs > of_tokens).sum(-1) + 1, ids, top
