"""The mixture of experts: the router, the experts that it selects for each token, and the shared expert.

Shapes: T tokens, D hidden, N experts, K of them selected per token; I the intermediate features that the rank has of
each of its M experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comm.base import Communicator
from ...kernels import expert_ops, ops
from ...kernels.arguments import Matrix
from .expert_config import ExpertConfig, ExpertShare
from .fp8_weights import add_matrix
from .linear import MLP
from .norm import NormInput, Residual
from .weights import ALL, Piece, Weights

SHARED_PROJECTIONS = "gate_proj", "up_proj", "down_proj"


class Router:
    """The choice of K experts for each token, and with `has_shared` of the shared expert after them.

    All ranks choose alike, because the router is replicated and its input is bitwise identical on all of them.
    """

    def __init__(
        self,
        weights: Weights,
        layer: str,
        hidden_size: int,
        experts: ExpertConfig,
        first_expert: int,
        *,
        has_shared: bool = False,
    ) -> None:
        self.experts, self.first_expert, self.batch_invariant = experts, first_expert, weights.batch_invariant
        n, rules, self.has_shared = experts.num_experts, experts.rules, has_shared
        name = f"{layer}.{rules.block}.gate.weight"
        pieces = [Piece(name, (n, hidden_size), into=(slice(n),))]
        if has_shared:
            gate = f"{layer}.{rules.block}.{rules.shared}_gate.weight"
            pieces.append(Piece(gate, (1, hidden_size), into=(slice(n, n + 1),)))
        # With batch_invariant there is a kernel for the model's dtype only.
        self.in_float32 = rules.float32_router and not weights.batch_invariant
        dtype = torch.float32 if self.in_float32 else None
        self.num_padding = experts.router_padding if has_shared else 0
        self.weight = weights.add((n + has_shared + self.num_padding, hidden_size), pieces, dtype=dtype)
        self.bias: Tensor | None = None
        if rules.bias is not None:
            shape = (1, n) if rules.bias_has_groups else (n,)
            # Biases of close experts differ by less than 16-bit floats do.
            self.bias = weights.add(shape, [Piece(f"{layer}.{rules.bias}", shape)], dtype=torch.float32).view(n)

    def __call__(self, normed: NormInput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed rows [T, D], the experts of each, [T, K] int64, and their scores, [T, K] float32.

        The rank's experts are numbered from 0; other numbers are experts of other ranks.
        """
        experts = self.experts
        rules: Any = {
            "normalized": experts.normalized,
            "scoring": experts.rules.scoring,
            "least_sum": experts.least_sum,
            "scaling": experts.scaling,
            "first_expert": self.first_expert,
            "has_shared": self.has_shared,
        }
        count, invariant = experts.num_per_token, self.batch_invariant
        if not self.in_float32 and experts.num_groups == 1:
            return expert_ops.route_tokens(
                normed.x, self.weight, count, norm=normed.weight, eps=normed.eps, bias=self.bias,
                num_padding=self.num_padding, batch_invariant=invariant, **rules,
            )  # fmt: skip
        x = normed.tensor()
        weight = self.weight[: len(self.weight) - self.num_padding]
        logits = F.linear(x.float(), weight) if self.in_float32 else ops.linear(x, weight, batch_invariant=invariant)
        bias = self.bias if experts.num_groups == 1 else self._bias_of_groups(logits)
        return x, *expert_ops.select_experts(logits, count, bias=bias, **rules)

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
        self, weights: Weights, comm: Communicator, layer: str, hidden_size: int, experts: ExpertConfig, *, bias: bool
    ) -> None:
        rules = experts.rules
        name = f"{layer}.{rules.block}.{rules.shared}"
        gate, up, down = (f"{name}.{projection}" for projection in SHARED_PROJECTIONS)
        sizes = hidden_size, experts.shared_size
        super().__init__(weights, comm, (gate, up), down, *sizes, bias=bias, norm_follows=False)  # the experts add
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
        self, weights: Weights, comm: Communicator, layer: str, hidden_size: int, experts: ExpertConfig, *, bias: bool
    ) -> None:
        part, rules = experts.of_rank(comm.rank, comm.size), experts.rules
        self.batch_invariant, self.adds_at_once = weights.batch_invariant, comm.size == 1
        # One more expert costs less than a layer beside them. FP8 checkpoints may quantize the two differently.
        as_expert = experts.shared_fits_expert and weights.quantization is None
        modules = [f"{layer}.{rules.block}.experts.{expert}" for expert in part.experts]
        places = [[f"{module}.{name}" for name in rules.projections] for module in modules]
        for expert in sorted(set(range(experts.num_experts)) - set(part.experts)):
            others = (f"{layer}.{rules.block}.experts.{expert}.{name}" for name in rules.projections)
            weights.of_other_ranks.update(others)
        if as_expert:
            places.append([f"{layer}.{rules.block}.{rules.shared}.{name}" for name in SHARED_PROJECTIONS])
        self.router = Router(weights, layer, hidden_size, experts, part.experts.start, has_shared=as_expert)
        self.gate_up, self.down = _add_experts(weights, places, part, experts.intermediate_size, hidden_size)
        self.shared: SharedExpert | None = None
        if experts.shared_size and not as_expert:
            self.shared = SharedExpert(weights, comm, layer, hidden_size, experts, bias=bias)

    def __call__(self, normed: NormInput, residual: Residual) -> None:
        """Add the experts' sum for rows [T, D] to `residual`."""
        x, selected, scores = self.router(normed)
        if self.shared is not None:
            self.shared(NormInput(x), residual)
        add_to = residual.total if self.adds_at_once and not residual.separate else residual.partial
        routed = expert_ops.experts(
            x, selected, scores, self.gate_up, self.down, add_to=add_to, batch_invariant=self.batch_invariant
        )
        if add_to is not residual.total:
            residual.partial = routed


def _add_experts(
    weights: Weights, modules: Sequence[Sequence[str]], part: ExpertShare, full: int, hidden: int
) -> tuple[Matrix, Matrix]:
    """Add the matrices [M, 2 I, D] and [M, D, I] of experts with these modules gate, up and down to `weights`.

    full  the intermediate features of an expert, of which the rank has those of `part`
    """
    rows, size = part.features, part.num_features
    gate_up, down = [], []
    for place, (gate, up, last) in enumerate(modules):
        for module, start in ((gate, 0), (up, size)):
            into = (place, slice(start, start + size))
            gate_up.append(Piece(f"{module}.weight", (full, hidden), (rows,), into))
        down.append(Piece(f"{last}.weight", (hidden, full), (ALL, rows), (place,)))
    matrices = add_matrix(weights, (len(modules), 2 * size, hidden), gate_up)
    return matrices, add_matrix(weights, (len(modules), hidden, size), down)
