"""Rotary position embedding: one table of cosines and sines from the checkpoint's parameters.

Sources: RoFormer (Su et al. 2021) for the default, position interpolation (Chen et al. 2023) for linear, YaRN
(Peng et al. 2023) for yarn, the Llama 3.1 release for llama3. The names and defaults of the parameters are those of
transformers. YaRN's attention factor is multiplied into the table, so that attention need not know it. Reading a config
needs no torch: only the functions that compute import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from .hf_config import HFConfigReader

if TYPE_CHECKING:
    from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The parameters of the angles; each type reads only its fields."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0  # positions before scaling; llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: dimensions that turn more often than this within original_positions are kept
    beta_slow: float = 1.0  # yarn: dimensions that turn less often are interpolated by the whole factor
    truncate: bool = True  # yarn: round the bounds between the two to whole dimensions
    attention_factor: float = 1.0  # yarn: cosines and sines are multiplied by it

    @classmethod
    def from_hf(cls, hf: HFConfigReader) -> RopeConfig:
        """Read config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4)."""
        scaling = hf.nested("rope_scaling")
        if not scaling.values:
            scaling = hf.nested("rope_parameters")
        nested = [name for name, value in scaling.values.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(
                f"{scaling.source}: {shortened(nested[0])} is an object; parameters per layer type are not supported"
            )
        kind = scaling.text("rope_type", scaling.text("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(
                f"{scaling.source}: rope type {shortened(kind)} is not supported; the supported ones are "
                f"{', '.join(ROPE_TYPES)}"
            )
        if scaling.number("partial_rotary_factor", hf.number("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"{hf.source}: partial_rotary_factor is not supported; every dimension must be rotated")
        theta = scaling.number("rope_theta", hf.number("rope_theta", 10000.0))
        if kind == "default":
            return cls(theta=theta)
        if kind == "linear":
            return cls(type=kind, theta=theta, factor=scaling.number("factor"))
        positions = hf.integer("max_position_embeddings")
        original = scaling.integer("original_max_position_embeddings", positions)
        scaled: dict[str, Any] = {
            "type": kind,
            "theta": theta,
            "original_positions": hf.integer("original_max_position_embeddings", original),
        }
        if kind == "yarn":
            scaled |= _yarn(scaling, positions / original)
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

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Return the radians per position of each pair of dimensions, [E / 2] float32."""
        import torch

        pairs = torch.arange(head_dim // 2).float()
        plain = 1.0 / self.theta ** (2 * pairs / head_dim)
        if self.type == "linear":
            return plain / self.factor
        if self.type == "llama3":
            return self._blend(plain, self._llama3_kept(plain))
        if self.type == "yarn":
            return self._blend(plain, self._yarn_kept(pairs, head_dim))
        return plain

    def table(self, head_dim: int, num_positions: int) -> Tensor:
        """Return [num_positions, E] float32: cosines in the first half of a row, sines in the second."""
        import torch

        angles = torch.outer(torch.arange(num_positions).float(), self.inverse_frequencies(head_dim))
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * self.attention_factor

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
