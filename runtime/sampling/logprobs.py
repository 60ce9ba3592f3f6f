"""How likely the model finds its prompts: log-probabilities of the prompt tokens that a step computes.

The logits of a whole prompt would be gigabytes (8,192 x 150,000 float32: 5 GB), so they are made, and gathered from
the ranks, some rows at a time. All ranks take part; only rank 0 brings anything to its host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from ..model.batch import to_device
from ..model.decoder import Decoder
from ..model.norm import Residual
from ..plan import PromptLogprobs, StepPlan, TokenLogprobs
from ..runner.slot_tables import HostBatch

ROWS_AT_ONCE = 64  # 40 MB of float32 logits for a vocabulary of 150,000


def prompt_logprobs(
    decoder: Decoder,
    residual: Residual,
    tokens: Tensor,
    plan: StepPlan,
    host: HostBatch,
    widths: np.ndarray,
    ends: np.ndarray,
) -> Callable[[], dict[int, PromptLogprobs]]:
    """The log-probability of each token that follows one computed in this step, by row of the plan.

    residual  of the step, [T, D]
    tokens    [slots, L] int32, on the device: what each slot holds
    widths    [B]  candidates wanted besides the token itself; negative: the row wants none of this
    ends      [B]  length of each row's prompt
    The returned function waits for the device; only one rank need call it.
    """
    numbers = np.where(widths >= 0, np.clip(ends - 1 - plan.starts, 0, plan.counts), 0)
    rows = np.repeat(np.arange(len(numbers)), numbers)
    offsets = np.arange(len(rows)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    index = host.query_starts[rows] + offsets
    following = plan.starts[rows] + offsets + 1
    width = int(widths.max())
    pieces = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        piece = slice(start, start + ROWS_AT_ONCE)
        where = (to_device(a[piece].astype(np.int64), tokens.device) for a in (index, plan.slots[rows], following))
        at, slots, positions = where
        pieces.append(_described(decoder.logits(residual, at).whole().float(), tokens[slots, positions], width))

    def collect() -> dict[int, PromptLogprobs]:
        found = {b: PromptLogprobs(int(plan.starts[b]) + 1, []) for b in np.flatnonzero(numbers).tolist()}
        entries = (entry for piece in pieces for entry in _entries(*piece))
        for row, (own, rank, ids, top) in zip(rows.tolist(), entries, strict=True):
            wanted = int(widths[row])
            found[row].logprobs.append(TokenLogprobs(own, rank, ids[:wanted], top[:wanted]))
        return found

    return collect


Described = tuple[Tensor, Tensor, Tensor, Tensor]


def _described(logits: Tensor, tokens: Tensor, width: int) -> Described:
    """Of each row's token: its log-probability and rank, and the ids and log-probabilities of the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None].long())
    top, ids = logprobs.topk(min(width, logits.shape[1]), dim=-1)
    return own[:, 0], (logprobs > own).sum(-1) + 1, ids, top


def _entries(
    own: Tensor, ranks: Tensor, ids: Tensor, top: Tensor
) -> Iterator[tuple[float, int, list[int], list[float]]]:
    return zip(own.tolist(), ranks.tolist(), ids.tolist(), top.tolist(), strict=True)
