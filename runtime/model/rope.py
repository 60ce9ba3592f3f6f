"""Rotary position embedding: one table of cosines and sines from the checkpoint's parameters.

Sources: RoFormer (Su et al. 2021) for the default, position interpolation (Chen et al. 2023) for linear, YaRN
(Peng et al. 2023) for yarn, LongRoPE (Ding et al. 2024) for longrope, the Llama 3.1 release for llama3. The names and
defaults of the parameters are those of transformers. The attention factor is multiplied into the table, so that
attention need not know it. Reading a config needs no torch: only the functions that compute import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from .hf_config import HFConfigReader

if TYPE_CHECKING:
    from torch import Tensor

LAYER_TYPES = "full_attention", "sliding_attention"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The parameters of the angles; each type reads only its fields."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    partial_rotary_factor: float = 1.0  # the part of a head that is rotated
    query_beta: float = 0.0  # queries grow by query_beta * log(1 + position // original_positions)
    original_positions: int = 0  # positions before scaling; llama3, yarn and longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this within original_positions are kept
    beta_slow: float = 1.0  # yarn: dimensions that turn less often are interpolated by the whole factor
    truncate: bool = True  # yarn: round the bounds between the two to whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: cosines and sines are multiplied by it
    short_factor: tuple[float, ...] = ()  # longrope: divides the frequencies for up to original_positions
    long_factor: tuple[float, ...] = ()  # longrope: divides them in longer contexts

    @classmethod
    def from_hf(cls, hf: HFConfigReader, *, partial: bool = False, query_scaling: bool = False) -> RopeConfig:
        """Read config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4).

        partial        partial_rotary_factor applies; else ValueError is raised for another one than 1
        query_scaling  llama_4_scaling_beta applies
        """
        scaling = hf.nested("rope_scaling")
        if not scaling.values:
            scaling = hf.nested("rope_parameters")
        nested = [name for name, value in scaling.values.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(
                f"{scaling.source}: {shortened(nested[0])} is an object; parameters per layer type are not supported"
            )
        rope = cls._from_scaling(hf, scaling, partial=partial)
        if query_scaling:
            positions = scaling.integer("original_max_position_embeddings")
            rope = replace(rope, query_beta=scaling.number("llama_4_scaling_beta"), original_positions=positions)
        return rope

    @classmethod
    def by_layer_type(cls, hf: HFConfigReader) -> dict[str, RopeConfig]:
        """Read `rope_parameters` of each layer type (transformers 5), or `rope_scaling` of full attention (4)."""
        parameters, scaling = hf.nested("rope_parameters"), hf.nested("rope_scaling")
        unknown = sorted(set(parameters.values) - {*LAYER_TYPES})
        if unknown:
            raise ValueError(
                f"{parameters.source} has {', '.join(map(shortened, unknown))}; it must have parameters for "
                f"{' and '.join(LAYER_TYPES)}"
            )
        theta = hf.values.get("rope_local_base_freq", hf.values.get("rope_theta"))
        local = HFConfigReader({**hf.values, "rope_theta": theta})
        ropes = {
            kind: cls._from_scaling(fields, parameters.nested(kind), partial=False)
            for kind, fields in (("full_attention", hf), ("sliding_attention", local))
        }
        if scaling.values:
            ropes["full_attention"] = cls._from_scaling(hf, scaling, partial=False)
        return ropes

    @classmethod
    def _from_scaling(cls, hf: HFConfigReader, scaling: HFConfigReader, *, partial: bool) -> RopeConfig:
        """Read the parameters `scaling` of one kind of layers."""
        kind = _rope_type(scaling)
        whole = (
            hf.integer("rotary_dim") / hf.integer("head_dim") if "rotary_dim" in hf else 1.0
        )  # a field of MiniMax-M2
        part = scaling.number(
            "partial_rotary_factor", hf.number("partial_rotary_factor", whole, maximum=1.0), maximum=1.0
        )
        if part != 1.0 and not partial:
            raise ValueError(f"{hf.source}: partial_rotary_factor is not supported; every dimension must be rotated")
        theta = scaling.number("rope_theta", hf.number("rope_theta", 10000.0))
        scaled: dict[str, Any] = {"type": kind, "theta": theta, "partial_rotary_factor": part}
        if kind == "default":
            return cls(**scaled)
        if kind == "linear":
            return cls(**scaled, factor=scaling.number("factor"))
        positions = hf.integer("max_position_embeddings")
        original = scaling.integer("original_max_position_embeddings", positions)
        scaled["original_positions"] = hf.integer("original_max_position_embeddings", original)
        if kind == "yarn":
            scaled |= _yarn(scaling, positions / original)
        elif kind == "longrope":
            scaled |= _longrope(scaling, positions, scaled["original_positions"])
        else:
            scaled |= {name: scaling.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        rope = cls(**scaled)
        rope._check(scaling.source)
        return rope

    def _check(self, source: str) -> None:
        """Raise ValueError for parameters between which nothing can be interpolated."""
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"{source}: high_freq_factor is {self.high_freq_factor:g}, it must be above low_freq_factor,"
                f" {self.low_freq_factor:g}; use the file that came with the checkpoint"
            )
        if self.type == "yarn" and self.theta <= 1:
            raise ValueError(
                f"{source}: rope_theta is {self.theta:g}, it must be above 1; use the checkpoint's own file"
            )

    @property
    def extended_positions(self) -> int:
        """The number of positions after YaRN's scaling, which config.json often omits; 0 for other types."""
        return int(self.original_positions * self.factor) if self.type == "yarn" else 0

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many elements of a head are rotated, the first ones."""
        return int(head_dim * self.partial_rotary_factor)

    def check_head_dim(self, head_dim: int) -> None:
        """Raise ValueError if the parameters do not fit heads of this size."""
        rotary = self.rotary_dim(head_dim)
        if rotary < 2 or rotary % 2:
            raise ValueError(
                f"config.json: partial_rotary_factor {self.partial_rotary_factor:g} rotates {rotary} of {head_dim} "
                "elements of a head; it must be an even number above 0"
            )
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.type == "longrope" and len(factors) != rotary // 2:
                raise ValueError(
                    f"config.json: {name} has {len(factors)} numbers; it must have one for each of {rotary // 2} pairs"
                )

    def inverse_frequencies(self, head_dim: int, num_positions: int = 0) -> Tensor:
        """Return the radians per position of each pair of dimensions, [R / 2] float32, R the rotated dimensions.

        num_positions  the longest context; with more than original_positions, longrope uses its long factors for all
        """
        import torch

        rotary = self.rotary_dim(head_dim)
        pairs = torch.arange(rotary // 2).float()
        plain = 1.0 / self.theta ** (2 * pairs / rotary)
        if self.type == "linear":
            return plain / self.factor
        if self.type == "llama3":
            return self._blend(plain, self._llama3_kept(plain))
        if self.type == "yarn":
            return self._blend(plain, self._yarn_kept(pairs, rotary))
        if self.type == "longrope":
            return plain / torch.tensor(
                self.long_factor if num_positions > self.original_positions else self.short_factor
            )
        return plain

    def table(self, head_dim: int, num_positions: int) -> Tensor:
        """Return [num_positions, R] float32: cosines in the first half of a row, sines in the second."""
        import torch

        angles = torch.outer(torch.arange(num_positions).float(), self.inverse_frequencies(head_dim, num_positions))
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor

    def query_scale(self, num_positions: int) -> Tensor | None:
        """Return the factor of the queries at each position, [num_positions] float32; None if all are 1."""
        import torch

        if self.query_beta == 0 or num_positions <= self.original_positions:
            return None
        return 1 + self.query_beta * torch.log1p(torch.arange(num_positions) // self.original_positions)

    def _blend(self, plain: Tensor, kept: Tensor) -> Tensor:
        """Mix the plain frequency, with weight `kept`, and the interpolated one, per pair."""
        return plain * kept + plain / self.factor * (1 - kept)

    def _llama3_kept(self, plain: Tensor) -> Tensor:
        """Return 1 for wavelengths below original / high_freq_factor, 0 above original / low_freq_factor."""
        turns = self.original_positions * plain / (2 * math.pi)
        return ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)

    def _yarn_kept(self, pairs: Tensor, head_dim: int) -> Tensor:
        """Return 1 up to the pair that makes beta_fast turns, 0 from that with beta_slow turns, else linear."""
        low, high = (self._pair_with_turns(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001  # no division by zero when both bounds are one pair
        return 1 - ((pairs - low) / width).clamp(0, 1)

    def _pair_with_turns(self, turns: float, head_dim: int) -> float:
        """Return the (fractional) pair that makes `turns` full turns within the original positions."""
        return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def _rope_type(scaling: HFConfigReader) -> str:
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind in ("su", "yarn") and "short_factor" in scaling:
        return "longrope"  # its older names in Phi-3
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{scaling.source}: rope type {shortened(kind)} is not supported; the supported ones are "
            f"{', '.join(ROPE_TYPES)}"
        )
    return kind


def _longrope(scaling: HFConfigReader, positions: int, original: int) -> dict[str, Any]:
    factor = scaling.number("factor", positions / original)
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {
        "factor": factor,
        "attention_factor": scaling.number("attention_factor", attention_factor),
        "short_factor": tuple(scaling.numbers("short_factor")),
        "long_factor": tuple(scaling.numbers("long_factor")),
    }


def _yarn(scaling: HFConfigReader, default_factor: float) -> dict[str, Any]:
    factor = scaling.number("factor", default_factor)
    attention_factor = _mscale(factor, 1.0)
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        attention_factor = _mscale(factor, scaling.number("mscale")) / _mscale(factor, scaling.number("mscale_all_dim"))
    return {
        "factor": factor,
        "attention_factor": scaling.number("attention_factor", attention_factor),
        "beta_fast": scaling.number("beta_fast", 32.0),
        "beta_slow": scaling.number("beta_slow", 1.0),
        "truncate": scaling.flag("truncate", True),
    }


def _mscale(factor: float, weight: float) -> float:
    """Return YaRN's temperature for a context extended by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
