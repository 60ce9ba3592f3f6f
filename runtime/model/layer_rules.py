"""The properties of each layer that config.json describes: sliding windows, rotation, experts.

Families describe this in different fields; `Architecture` in families.py says which apply.
"""

from __future__ import annotations

from reprlib import repr as shortened

from .families import Architecture, ExpertLayers, Windows
from .hf_config import HFConfigReader
from .rope import LAYER_TYPES, RopeConfig


def windows_of_layers(fields: HFConfigReader, rule: Windows, num_layers: int) -> tuple[int | None, ...]:
    """Return the sliding window of each layer. An absent field means transformers' default of 4096, null means none."""
    if rule == "layer types":
        _sliding_layers(fields, rule, num_layers)  # refuses unknown layers, also without a window
    enabled = rule in ("always", "layer types") or (rule != "never" and fields.flag("use_sliding_window", False))
    if not enabled or fields.values.get("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = fields.integer("sliding_window", 4096)
    if rule in ("always", "flagged"):
        return (window,) * num_layers
    return tuple(window if is_sliding else None for is_sliding in _sliding_layers(fields, rule, num_layers))


def _sliding_layers(fields: HFConfigReader, rule: Windows, num_layers: int) -> list[bool]:
    """Return whether each layer has the sliding window, by layer_types or by the family's rule without that list."""
    if "layer_types" in fields:
        return [kind == "sliding_attention" for kind in _layer_types(fields, num_layers)]
    if rule == "flagged, upper layers":
        first = fields.integer("max_window_layers", 28, minimum=0)
        return [layer >= first for layer in range(num_layers)]
    if rule == "flagged, unrotated layers":
        unrotated = _unrotated_layers(fields, num_layers)
        return [layer in unrotated for layer in range(num_layers)]
    pattern = fields.integer("sliding_window_pattern")  # each layer of such a number sees all keys
    return [(layer + 1) % pattern != 0 for layer in range(num_layers)]


def _layer_types(fields: HFConfigReader, num_layers: int) -> list[str]:
    kinds = ["full_attention" if kind == "attention" else kind for kind in fields.texts("layer_types")]
    unknown = sorted(set(kinds) - {*LAYER_TYPES})
    if unknown:
        raise ValueError(
            f"config.json: layer_types has {', '.join(map(shortened, unknown))}; the supported ones are "
            f"{', '.join(LAYER_TYPES)}"
        )
    if len(kinds) != num_layers:
        raise ValueError(
            f"config.json: layer_types has {len(kinds)} entries; it must have one for each of the {num_layers} layers"
        )
    return kinds


def ropes_of_layers(
    fields: HFConfigReader, architecture: Architecture, num_layers: int
) -> tuple[RopeConfig | None, ...]:
    """Return the rotation of each layer."""
    if architecture.rotation == "by layer type":
        by_type = RopeConfig.by_layer_type(fields)
        sliding = _sliding_layers(fields, architecture.windows, num_layers)
        return tuple(by_type["sliding_attention" if is_sliding else "full_attention"] for is_sliding in sliding)
    partial, query_scaling = architecture.partial_rotary, architecture.query_scaling
    rope = RopeConfig.from_hf(fields, partial=partial, query_scaling=query_scaling)
    if architecture.rotation == "no_rope_layers":
        unrotated = _unrotated_layers(fields, num_layers)
        return tuple(None if layer in unrotated else rope for layer in range(num_layers))
    if architecture.rotation == "windowed layers" and "sliding_window" in fields:
        sliding = _sliding_layers(fields, architecture.windows, num_layers)
        return tuple(rope if is_sliding else None for is_sliding in sliding)
    if architecture.rotation == "position_embedding_type" and fields.values.get("position_embedding_type") != "rope":
        return (None,) * num_layers
    return (rope,) * num_layers


def _unrotated_layers(fields: HFConfigReader, num_layers: int) -> set[int]:
    """Return the layers of which no_rope_layers is 0, which are every no_rope_layer_interval-th without that list."""
    if "no_rope_layers" not in fields:
        interval = fields.integer("no_rope_layer_interval")
        return {layer for layer in range(num_layers) if (layer + 1) % interval == 0}
    rotated = fields.integers("no_rope_layers")
    if len(rotated) < num_layers or not set(rotated) <= {0, 1}:
        raise ValueError(
            f"config.json: no_rope_layers is {shortened(rotated)}; it must have a 1 or a 0 for each of the {num_layers}"
            " layers: whether that layer has rotary positions"
        )
    return {layer for layer in range(num_layers) if rotated[layer] == 0}


def expert_layers(fields: HFConfigReader, rule: ExpertLayers, num_layers: int) -> frozenset[int]:
    """Return the layers with experts: by mlp_layer_types, or by the family's rule without that list."""
    if rule == "after the dense ones":
        return frozenset(range(fields.integer("first_k_dense_replace", minimum=0), num_layers))
    if rule == "interval":
        first, last = (fields.integer(f"moe_layer_{x}_index", minimum=-1) for x in ("start", "end"))
        step = fields.integer("moe_layer_interval")
        last = num_layers - 1 if last == -1 else last
        return frozenset(n for n in range(max(first, 0), min(last + 1, num_layers)) if (n + 1) % step == 0)
    kinds = fields.texts("mlp_layer_types")
    if not kinds:
        step, dense = fields.integer("decoder_sparse_step", 1), fields.integers("mlp_only_layers")
        return frozenset(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0)
    if len(kinds) != num_layers or not set(kinds) <= {"dense", "sparse"}:
        raise ValueError(
            f"config.json: mlp_layer_types is {shortened(kinds)}; it must have 'dense' or 'sparse' for each of the "
            f"{num_layers} layers"
        )
    return frozenset(n for n in range(num_layers) if kinds[n] == "sparse")
