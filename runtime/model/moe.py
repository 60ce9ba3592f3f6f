"""Mixture of experts: a router selects a few experts for each token and mixes their outputs.

Every rank holds its shard of the intermediate features of *every* expert, as of an MLP. All ranks route alike, because
the router is replicated and its input is bitwise identical on all of them. The output is a partial sum.
Shapes: N experts, K selected per token, I the rank's intermediate features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .linear import shard_of
from .model_config import Experts
from .norm import Normed, Residual
from .weights import ALL, Piece, Weights


class MoE:
    """`sum of score * expert(x)` over the selected experts."""

    def __init__(self, weights: Weights, comm: Communicator, name: str, hidden_size: int, experts: Experts) -> None:
        self.experts = experts
        self.batch_invariant = weights.batch_invariant
        n, full, hidden = experts.num_experts, experts.intermediate_size, hidden_size
        rows = shard_of(full, comm)
        size = full // comm.size
        gate_up, down = [], []
        for expert in range(n):
            prefix = f"{name}.experts.{expert}"
            for part, start in (("gate", 0), ("up", size)):
                into = (expert, slice(start, start + size))
                gate_up.append(Piece(f"{prefix}.{part}_proj.weight", (full, hidden), (rows,), into))
            down.append(Piece(f"{prefix}.down_proj.weight", (hidden, full), (ALL, rows), (expert,)))
        self.router = weights.add((n, hidden), [Piece(f"{name}.gate.weight", (n, hidden))])
        self.gate_up = weights.add((n, 2 * size, hidden), gate_up)
        self.down = weights.add((n, hidden, size), down)

    def __call__(self, normed: Normed, residual: Residual) -> None:
        """Leave the experts' sum for rows [T, D] in `residual`; the next norm adds it."""
        x = normed.tensor()
        scores, selected = self._route(x)
        residual.partial = ops.experts(x, selected, scores, self.gate_up, self.down)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores [T, K] float32 and the indices [T, K] int64 of each token's experts."""
        probabilities = ops.linear(x, self.router, batch_invariant=self.batch_invariant).softmax(
            -1, dtype=torch.float32
        )
        scores, selected = probabilities.topk(self.experts.num_per_token, dim=-1)
        if self.experts.normalized:
            scores = scores / scores.sum(-1, keepdim=True)
        return scores, selected
