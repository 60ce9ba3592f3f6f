"""The numbers that a rank of a model holds, from config.json alone: parameters, keys and values, recurrent states.

Repeats the shapes of the layers; tests compare the two. A Decoder on torch's meta device could count itself, but
importing torch takes 1.5 s, and `lockstep doctor` runs in 0.3 s without it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..model.delta_net_config import DeltaNetConfig
from ..model.expert_config import MXFP4_BLOCK
from ..model.model_config import ModelConfig
from ..model.rank_shares import share, share_of_features


def state_bytes(model: ModelConfig, ranks: int, rank: int, itemsize: int) -> int:
    """Return the bytes of one recurrent state over all layers; see StateShape."""
    if model.delta_net is None:
        return 0
    net, (keys, values) = model.delta_net, _delta_features(model.delta_net, ranks, rank)
    inputs = (net.taps - 1) * (2 * keys + values) * itemsize
    return len(net.layers) * (inputs + 4 * values * net.key_size)


def parameters_of_rank(model: ModelConfig, ranks: int, rank: int = 0) -> int:
    """Return the parameters that the Decoder of one of `ranks` ranks allocates, padding included."""
    mlps = sum(
        _experts_size(model, ranks, rank) if model.has_experts(n) else _mlp_size(model, ranks, rank)
        for n in range(model.num_layers)
    )
    norms = (len(model.names.norms) * model.num_layers + 1) * model.hidden_size
    attention = len(model.attention_layers) * _attention_size(model, ranks, rank)
    if model.delta_net is not None:
        attention += len(model.delta_net.layers) * _delta_size(model, model.delta_net, ranks, rank)
    return _vocabulary_size(model, ranks) + attention + mlps + norms


def parameters_per_token(model: ModelConfig, ranks: int) -> float:
    """Return the parameters of rank 0's layers that a token is multiplied by: of experts, those that it selects."""
    unused = 0.0
    if model.experts is not None:
        part, share_of_token = model.experts.of_rank(0, ranks), model.experts.num_per_token / model.experts.num_experts
        experts = 3 * part.num_features * model.hidden_size * len(part.experts)
        unused = len(model.experts.layers) * experts * (1 - share_of_token)
    return parameters_of_rank(model, ranks) - _vocabulary_size(model, ranks) - unused


def _vocabulary_size(model: ModelConfig, ranks: int) -> int:
    """Return the parameters of the embedding and of the head, which may be one matrix."""
    return (1 if model.tie_word_embeddings else 2) * -(-model.vocab_size // ranks) * model.hidden_size


def saved_by_quantization(model: ModelConfig, ranks: int, itemsize: int, rank: int = 0) -> int:
    """Return the bytes that FP8 or MXFP4 saves, less the scales, on a rank whose other weights have this itemsize."""
    if model.experts is not None and model.experts.mxfp4:
        part = model.experts.of_rank(rank, ranks)
        numbers = 3 * part.num_features * model.hidden_size * len(part.experts)
        return len(model.experts.layers) * (numbers * itemsize - numbers // 2 - numbers // MXFP4_BLOCK)
    if model.quantization is None:
        return 0
    saved = 0
    for names, rows, columns, copies in _matrices(model, ranks, rank):
        if model.quantization.covers_all(names):
            bounds = [sum(rows[:n]) for n in range(len(rows))]
            if model.adjacent_pairs and len(rows) == 3:  # of q, k and v
                bounds += model.quantization.bounds_of_pairs(model.head_dim)
            grid = model.quantization.grid(bounds, columns, first_column=0)
            down, across = grid.shape(sum(rows), columns)
            saved += copies * (sum(rows) * columns * (itemsize - 1) - 4 * down * across)
    return saved


def _matrices(model: ModelConfig, ranks: int, rank: int) -> Iterator[tuple[list[str], list[int], int, int]]:
    """Yield the modules, rows of each, columns and number of all matrices of the rank that may be FP8."""
    assert model.quantization is not None
    hidden, names, (q, kv) = model.hidden_size, model.names, _head_features(model, ranks, rank)
    for layer in range(model.num_layers):
        name = f"model.layers.{layer}"
        if model.delta_net is not None and layer in model.delta_net.layers:
            yield from _delta_matrices(f"{name}.linear_attn", hidden, model.delta_net, ranks, rank)
        else:
            yield [f"{name}.{module}" for module in names.qkv], [q, kv, kv], hidden, 1
            if model.output_gate:
                yield [f"{name}.{names.qkv[0]}"], [q], hidden, 1
            yield [f"{name}.{names.output}"], [hidden], q, 1
        for gate_up, down, features, copies in _mlps(model, layer, ranks, rank):
            yield [f"{name}.{module}" for module in gate_up], [features, features], hidden, copies
            yield [f"{name}.{down}"], [hidden], features, copies
    if model.quantization.includes_head and not model.tie_word_embeddings:
        yield ["lm_head"], [-(-model.vocab_size // ranks)], hidden, 1


def _mlps(model: ModelConfig, layer: int, ranks: int, rank: int) -> Iterator[tuple[tuple[str, ...], str, int, int]]:
    """Yield the modules of gate and up, that of down, the rank's features and number of a layer's MLPs or experts."""
    if model.experts is None or not model.has_experts(layer):
        yield model.names.gate_up, model.names.down, _share(model.intermediate_size, ranks, rank), 1
        return
    experts, rules = model.experts, model.experts.rules
    gate, up, down = (f"{rules.block}.experts.0.{projection}" for projection in rules.projections)
    part = experts.of_rank(rank, ranks)
    yield (gate, up), down, part.num_features, len(part.experts)
    if experts.shared_size:
        gate, up, down = (f"{rules.block}.{rules.shared}.{x}_proj" for x in ("gate", "up", "down"))
        yield (gate, up), down, _share(experts.shared_size, ranks, rank), 1


def _delta_matrices(
    name: str, hidden: int, net: DeltaNetConfig, ranks: int, rank: int
) -> Iterator[tuple[list[str], list[int], int, int]]:
    keys, values = _delta_features(net, ranks, rank)
    heads = values // net.value_size
    yield [f"{name}.in_proj_qkv", f"{name}.in_proj_z"], [keys, keys, values, values], hidden, 1
    yield [f"{name}.in_proj_b", f"{name}.in_proj_a"], [heads, heads], hidden, 1
    yield [f"{name}.out_proj"], [hidden], values, 1


def kv_elements_per_token(model: ModelConfig, ranks: int, rank: int = 0) -> int:
    """Return the elements of one token's keys and values in a page, over the layers that a page has."""
    return 2 * model.layer_groups.layers_per_page * len(model.heads_of_rank(rank, ranks).kv) * model.stored_head_dim


def _attention_size(model: ModelConfig, ranks: int, rank: int) -> int:
    q, kv = _head_features(model, ranks, rank)
    qkv = q + 2 * kv
    biases = model.qkv_bias * qkv + model.output_bias * model.hidden_size
    norms = {"none": 0, "each head": 2 * model.head_dim, "all heads": q + kv}[model.qk_norm]
    gate = model.output_gate * q * (model.hidden_size + model.qkv_bias)
    sinks = model.sinks * q // model.head_dim
    return (qkv + q) * model.hidden_size + gate + biases + norms + sinks


def _delta_size(model: ModelConfig, net: DeltaNetConfig, ranks: int, rank: int) -> int:
    keys, values = _delta_features(net, ranks, rank)
    heads = values // net.value_size
    projections = 2 * keys + 3 * values + 2 * heads  # q, k, v, z, output, b, a
    return projections * model.hidden_size + net.taps * (2 * keys + values) + 2 * heads + net.value_size


def _delta_features(net: DeltaNetConfig, ranks: int, rank: int) -> tuple[int, int]:
    """Return the features of the rank's key heads, and of its value heads."""
    keys = len(share(net.key_heads, rank, ranks))
    return keys * net.key_size, keys * net.value_heads // net.key_heads * net.value_size


def _mlp_size(model: ModelConfig, ranks: int, rank: int) -> int:
    return _dense_size(model, _share(model.intermediate_size, ranks, rank))


def _dense_size(model: ModelConfig, features: int) -> int:
    return 3 * features * model.hidden_size + model.mlp_bias * (2 * features + model.hidden_size)


def _experts_size(model: ModelConfig, ranks: int, rank: int) -> int:
    experts = model.experts
    assert experts is not None
    part = experts.of_rank(rank, ranks)
    router, expert, shared = model.hidden_size + (experts.rules.bias is not None), 3 * part.num_features, 0
    expert *= model.hidden_size
    if experts.clamped is not None:
        router, expert = router + 1, expert + 2 * part.num_features + model.hidden_size  # with biases
    if experts.shared_size:
        shared = _dense_size(model, _share(experts.shared_size, ranks, rank))
        shared += experts.rules.shared_gate * model.hidden_size
        if experts.shared_fits_expert and model.quantization is None:
            shared += experts.router_padding * model.hidden_size
    return experts.num_experts * router + len(part.experts) * expert + shared


def float32_parameters(model: ModelConfig) -> int:
    """Return the parameters of routers that are float32, whatever the model's dtype."""
    if model.experts is None:
        return 0
    rules = model.experts.rules
    per_expert = rules.float32_router * model.hidden_size + (rules.bias is not None)
    return len(model.experts.layers) * model.experts.num_experts * per_expert


def _head_features(model: ModelConfig, ranks: int, rank: int) -> tuple[int, int]:
    """Return the features of the rank's query heads, and of its KV heads."""
    heads = model.heads_of_rank(rank, ranks)
    return len(heads.queries) * model.head_dim, len(heads.kv) * model.head_dim


def _share(features: int, ranks: int, rank: int) -> int:
    part = share_of_features(features, rank, ranks)
    return int(part.stop - part.start)
