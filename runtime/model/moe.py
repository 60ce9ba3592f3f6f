"""The mixture of experts: the router, the experts that it selects for each token, and the expert of all tokens.

Shapes: T tokens, D hidden, N experts, K of them selected per token; I the intermediate features that the rank has of
each of its M experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import ops
from .expert_config import Experts
from .fp8_weights import add_matrix
from .linear import MLP
from .norm import NormInput, Residual
from .weights import ALL, Piece, Weights


class Router:
    """The choice of K experts for each token.

    All ranks choose alike, because the router is replicated and its input is bitwise identical on all of them.
    """

    def __init__(self, weights: Weights, layer: str, hidden_size: int, experts: Experts, first_expert: int) -> None:
        self.experts, self.first_expert, self.batch_invariant = experts, first_expert, weights.batch_invariant
        n, rules = experts.num_experts, experts.rules
        name = f"{layer}.{rules.block}.gate.weight"
        # With batch_invariant there is a kernel for the model's dtype only.
        self.in_float32 = rules.float32_router and not weights.batch_invariant
        dtype = torch.float32 if self.in_float32 else None
        self.weight = weights.add((n, hidden_size), [Piece(name, (n, hidden_size))], dtype=dtype)
        self.bias: Tensor | None = None
        if rules.bias is not None:
            shape = (1, n) if rules.bias_has_groups else (n,)
            # Biases of close experts differ by less than 16-bit floats do.
            self.bias = weights.add(shape, [Piece(f"{layer}.{rules.bias}", shape)], dtype=torch.float32).view(n)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each row of x [T, D], [T, K] int64, and their scores, [T, K] float32.

        The rank's experts are numbered from 0; other numbers are experts of other ranks.
        """
        experts = self.experts
        if self.in_float32:
            logits = F.linear(x.float(), self.weight)
        else:
            logits = ops.linear(x, self.weight, batch_invariant=self.batch_invariant)
        return ops.select_experts(
            logits,
            experts.num_per_token,
            normalized=experts.normalized,
            scoring=experts.rules.scoring,
            bias=self.bias if experts.num_groups == 1 else self._bias_of_groups(logits),
            least_sum=experts.least_sum,
            scaling=experts.scaling,
            first_expert=self.first_expert,
        )

    def _bias_of_groups(self, logits: Tensor) -> Tensor:
        """Return the bias [T, N], -inf outside of the groups whose two best experts have the greatest sums."""
        assert self.bias is not None
        scores = (logits.float().sigmoid() + self.bias).view(len(logits), self.experts.num_groups, -1)
        best = scores.topk(2, dim=-1).values.sum(-1).topk(self.experts.groups_per_token, dim=-1).indices
        excluded = torch.ones_like(scores[..., 0], dtype=torch.bool).scatter(1, best, False)
        per_group = self.bias.view(self.experts.num_groups, -1)
        return per_group.masked_fill(excluded.unsqueeze(-1), -torch.inf).flatten(1)


class SharedExpert(MLP):
    """The MLP of all tokens beside the experts; some families have a gate, whose sigmoid scales it for each token."""

    def __init__(
        self, weights: Weights, comm: Communicator, layer: str, hidden_size: int, experts: Experts, *, bias: bool
    ) -> None:
        rules = experts.rules
        name = f"{layer}.{rules.block}.{rules.shared}"
        gate_up = f"{name}.gate_proj", f"{name}.up_proj"
        super().__init__(weights, comm, gate_up, f"{name}.down_proj", hidden_size, experts.shared_size, bias=bias)
        self.gate: Tensor | None = None
        if rules.shared_gate:
            self.gate = weights.add((1, hidden_size), [Piece(f"{name}_gate.weight", (1, hidden_size))])
        self.batch_invariant = weights.batch_invariant

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Add the MLP of rows [T, D] to `residual`."""
        hidden = self.gate_up(normed)
        if self.gate is not None:
            hidden *= ops.linear(normed.tensor(), self.gate, batch_invariant=self.batch_invariant).sigmoid()
        self.down(hidden, residual)


class MoE:
    """`sum of score * expert(x)` over the experts that a router selects for each token, and the shared expert.

    Every rank holds its shard of the intermediate features of every expert, as of an MLP; or, with expert parallelism,
    whole experts. It then leaves the sum over its own ones, and nothing else changes.
    """

    def __init__(
        self, weights: Weights, comm: Communicator, layer: str, hidden_size: int, experts: Experts, *, bias: bool
    ) -> None:
        part, full, hidden = experts.of_rank(comm.rank, comm.size), experts.intermediate_size, hidden_size
        rows, size, count = part.features, part.num_features, len(part.experts)
        gate_up, down = [], []
        for expert in range(experts.num_experts):
            modules = [f"{layer}.{experts.rules.block}.experts.{expert}.{name}" for name in experts.rules.projections]
            if expert not in part.experts:
                weights.of_other_ranks.update(modules)
                continue
            place = expert - part.experts.start
            gate_name, up_name, down_name = (f"{module}.weight" for module in modules)
            for name, start in ((gate_name, 0), (up_name, size)):
                into = (place, slice(start, start + size))
                gate_up.append(Piece(name, (full, hidden), (rows,), into))
            down.append(Piece(down_name, (hidden, full), (ALL, rows), (place,)))
        self.router = Router(weights, layer, hidden, experts, part.experts.start)
        self.gate_up = add_matrix(weights, (count, 2 * size, hidden), gate_up)
        self.down = add_matrix(weights, (count, hidden, size), down)
        self.shared: SharedExpert | None = None
        if experts.shared_size:
            self.shared = SharedExpert(weights, comm, layer, hidden, experts, bias=bias)

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Leave the experts' sum for rows [T, D] in `residual`; the next norm adds it."""
        x = normed.tensor()
        if self.shared is not None:
            self.shared(NormInput(x), residual)
        selected, scores = self.router(x)
        routed = ops.experts(x, selected, scores, self.gate_up, self.down)
        residual.partial = routed if residual.partial is None else residual.partial.add_(routed)
