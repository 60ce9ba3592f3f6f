"""The mixture of experts that config.json describes, read by the rules of the model's family."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shortened
from typing import NamedTuple

from .families import ExpertRules
from .hf_config import HFConfigReader
from .layer_rules import expert_layers
from .quantization import is_mxfp4
from .rank_shares import share, share_of_features

MXFP4_BLOCK = 32  # numbers with one scale


class ExpertShare(NamedTuple):
    """The experts of one rank, and the intermediate features of each that it has."""

    experts: range
    features: slice

    @property
    def num_features(self) -> int:
        return int(self.features.stop - self.features.start)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The mixture of experts of the layers in `layers`."""

    rules: ExpertRules
    num_experts: int
    num_per_token: int
    intermediate_size: int  # features of one expert
    normalized: bool  # the scores of a token's experts are scaled to sum up to 1
    layers: frozenset[int]
    least_sum: float = 0.0  # the least divisor of that scaling
    scaling: float = 1.0  # factor of the scores
    num_groups: int = 1  # the experts are in so many groups
    groups_per_token: int = 1  # of which so many are searched for a token
    shared_size: int = 0  # features of the shared expert; 0 for none
    clamped: tuple[float, float] | None = None  # alpha and limit of the SwiGLU of gpt-oss
    mxfp4: bool = False  # the weights are 4-bit numbers
    parallel: bool = False  # a rank has whole experts, not a part of the features of every expert

    @property
    def block(self) -> int | None:
        """The number of intermediate features that one rank holds together; None for any."""
        return MXFP4_BLOCK if self.mxfp4 else None

    @property
    def shared_fits_expert(self) -> bool:
        """Whether the shared expert can be computed as one more expert: it has the same size, and a gate."""
        return self.rules.shared_gate and self.shared_size == self.intermediate_size and not self.parallel

    @property
    def router_padding(self) -> int:
        """Rows after those of the experts and of the shared one: cuBLAS is slow unless they are a multiple of 8."""
        return -(self.num_experts + 1) % 8

    def of_rank(self, rank: int, ranks: int) -> ExpertShare:
        """Return the experts and features of this rank; the shared expert is divided by features in any case."""
        if self.parallel:
            return ExpertShare(share(self.num_experts, rank, ranks), slice(0, self.intermediate_size))
        features = share_of_features(self.intermediate_size, rank, ranks, self.block)
        return ExpertShare(range(self.num_experts), features)

    def note(self, ranks: int) -> str:
        """Return the number of whole experts of a rank as text."""
        most = "" if self.num_experts % ranks == 0 else "up to "
        return f"{most}{len(self.of_rank(0, ranks).experts)} of {self.num_experts} whole experts on each rank"

    @classmethod
    def from_hf(cls, fields: HFConfigReader, rules: ExpertRules, num_layers: int) -> ExpertConfig:
        """Read the fields of config.json that the family has."""
        _check_scoring(fields, rules)
        features = fields.integer(rules.intermediate_size)
        normalized = rules.normalized
        experts = cls(
            rules=rules,
            num_experts=fields.integer("num_local_experts" if "num_local_experts" in fields else rules.num_experts),
            num_per_token=fields.integer(rules.num_per_token),
            intermediate_size=features,
            normalized=fields.flag(normalized, False) if isinstance(normalized, str) else normalized,
            layers=expert_layers(fields, rules.layers, num_layers),
            least_sum=fields.number(rules.least_sum) if rules.least_sum else 0.0,
            scaling=fields.number(rules.scaling) if rules.scaling else 1.0,
            num_groups=fields.integer("n_group") if rules.groups else 1,
            groups_per_token=fields.integer("topk_group") if rules.groups else 1,
            shared_size=_shared_size(fields, rules, features),
            clamped=(fields.number("swiglu_alpha"), fields.number("swiglu_limit")) if rules.clamped else None,
            mxfp4=is_mxfp4(fields),
        )
        experts._check()
        return experts

    def _check(self) -> None:
        """Raise ValueError if a token cannot have so many experts or groups."""
        rules = self.rules
        if self.num_per_token > self.num_experts:
            raise ValueError(
                f"config.json: {rules.num_per_token} is {self.num_per_token}; "
                f"it must be at most {rules.num_experts}, {self.num_experts}"
            )
        if self.num_groups == 1:
            return
        if self.num_experts % self.num_groups or self.num_experts < 2 * self.num_groups:
            raise ValueError(
                f"config.json: n_group is {self.num_groups}; it must divide the {self.num_experts} experts into groups"
                " of two or more"
            )
        searched = self.groups_per_token * self.num_experts // self.num_groups
        if self.groups_per_token > self.num_groups or searched < self.num_per_token:
            raise ValueError(
                f"config.json: topk_group is {self.groups_per_token}; it must be at most n_group, {self.num_groups},"
                f" and so many groups must have {self.num_per_token} experts"
            )


def _check_scoring(fields: HFConfigReader, rules: ExpertRules) -> None:
    kind = fields.text("scoring_func", rules.scoring)
    if kind != rules.scoring:
        raise ValueError(f"config.json: scoring_func {shortened(kind)} is not supported; it must be '{rules.scoring}'")


def _shared_size(fields: HFConfigReader, rules: ExpertRules, features: int) -> int:
    if rules.shared_count is not None:
        return features * fields.integer(rules.shared_count, minimum=0)
    return fields.integer(rules.shared_size) if rules.shared_size is not None else 0
