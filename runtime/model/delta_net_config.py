"""The layers of the gated delta rule as config.json describes them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shortened

from .hf_config import HFConfigReader


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """The gated delta rule of the layers in `layers`."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int  # width of the convolution before it
    layers: frozenset[int]

    @classmethod
    def from_hf(cls, fields: HFConfigReader, num_layers: int) -> DeltaNetConfig:
        """Read the fields linear_* of config.json; raises ValueError if they do not fit each other."""
        net = cls(
            key_heads=fields.integer("linear_num_key_heads"),
            value_heads=fields.integer("linear_num_value_heads"),
            key_size=fields.integer("linear_key_head_dim"),
            value_size=fields.integer("linear_value_head_dim"),
            taps=fields.integer("linear_conv_kernel_dim", minimum=2),
            layers=_recurrent_layers(fields, num_layers),
        )
        if net.value_heads % net.key_heads:
            raise ValueError(
                f"config.json: {net.value_heads} value heads cannot share {net.key_heads} key heads; "
                "linear_num_value_heads must be a multiple of linear_num_key_heads"
            )
        return net


def _recurrent_layers(fields: HFConfigReader, num_layers: int) -> frozenset[int]:
    """Return the layers of the gated delta rule: by layer_types, or all but each full_attention_interval-th."""
    kinds = fields.texts("layer_types")
    if not kinds:
        interval = fields.integer("full_attention_interval")
        kinds = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"linear_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types is {shortened(kinds)}; it must have 'linear_attention' or 'full_attention' for"
            f" each of the {num_layers} layers"
        )
    if "full_attention" not in kinds:
        raise ValueError("config.json: layer_types has no 'full_attention'; such models are not supported")
    return frozenset(n for n in range(num_layers) if kinds[n] == "linear_attention")
