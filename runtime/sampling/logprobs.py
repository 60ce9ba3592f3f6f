"""Log-probabilities of sampled tokens and of prompt tokens.

The logits of a whole prompt would be gigabytes (8,192 x 150,000 float32: 5 GB). They are therefore computed, and
gathered from the ranks, for some rows at a time. All ranks take part; only rank 0 copies results to its host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.batch import to_device
from ..model.decoder import Decoder
from ..model.norm import Residual
from ..plan import StepPlan, TokenLogprobs

ROWS_AT_ONCE = 64  # 40 MB of float32 logits for a vocabulary of 150,000
# Of n tokens: log-probability [n], rank [n], ids [n, W] and log-probabilities [n, W] of the tokens to report, and their
# ranks [n, W] unless these are the most likely tokens.
DeviceLogprobs = tuple[Tensor, ...]


@dataclass(frozen=True)
class PendingLogprobs:
    """Log-probabilities of N tokens, which the device may still be computing."""

    rows: np.ndarray  # [N] int64: the row of each token
    widths: np.ndarray  # [N] int32: tokens to report for each
    chunks: list[DeviceLogprobs]

    def wait(self) -> list[tuple[int, TokenLogprobs]]:
        """Return each token's row and log-probabilities; waits for the device."""
        entries = [entry for chunk in self.chunks for entry in zip(*(t.tolist() for t in chunk), strict=True)]
        tokens = zip(self.rows.tolist(), self.widths.tolist(), entries, strict=True)
        return [
            (row, TokenLogprobs(value, rank, ids[:n], top[:n], *ranks))
            for row, n, (value, rank, ids, top, *ranks) in tokens
        ]


def sampled_logprobs(
    logits: Tensor, tokens: Tensor, widths: np.ndarray, reported: Mapping[int, Tensor]
) -> PendingLogprobs:
    """Return the log-probabilities of sampled tokens.

    logits    [S, V] float32, as the model computed them
    tokens    [S] int32
    widths    [S] int32: most likely tokens to report; negative for rows without log-probabilities, not all of them
    reported  by row: the tokens to report in place of the most likely ones, [n] int64
    """
    rows = np.array([row for row in np.flatnonzero(widths >= 0).tolist() if row not in reported], np.int64)
    chunks = [_logprobs_of(logits[row], tokens[row], ids) for row, ids in reported.items()]
    if len(rows):
        index = torch.from_numpy(rows).to(logits.device)
        chunks.insert(0, _device_logprobs(logits[index], tokens[index], int(widths.max())))
    all_widths = np.append(widths[rows], [len(ids) for ids in reported.values()]).astype(np.int32)
    return PendingLogprobs(np.append(rows, list(reported)).astype(np.int64), all_widths, chunks)


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


def _logprobs_of(logits: Tensor, token: Tensor, ids: Tensor) -> DeviceLogprobs:
    """Return the log-probabilities of a token and of `ids` [n] int64, from logits [V] float32."""
    logprobs = logits.log_softmax(-1)
    values = logprobs[torch.cat((token[None].long(), ids))]
    ranks = torch.searchsorted(logprobs.sort().values, values, right=True).neg() + len(logprobs) + 1
    return values[:1], ranks[:1], ids[None], values[None, 1:], ranks[None, 1:]
