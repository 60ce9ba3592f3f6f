"""The number of parameters that a rank holds, from the config alone.

This repeats the shapes of the layers; tests/runtime/test_parameter_count.py compares the two.
A Decoder on torch's meta device could count itself in 0.03 s. But importing torch takes 1.5 s, and `lockstep doctor`
runs in 0.3 s without it.
"""

from __future__ import annotations

from ..model.model_config import ModelConfig


def parameters_of_rank(model: ModelConfig, ranks: int) -> int:
    """Return the parameters that the Decoder of each of `ranks` ranks allocates, padding included."""
    vocabulary = -(-model.vocab_size // ranks) * model.hidden_size  # of the embedding, or the head
    mlps = sum(_experts(model, ranks) if model.has_experts(n) else _mlp(model, ranks) for n in range(model.num_layers))
    norms = (2 * model.num_layers + 1) * model.hidden_size
    tables = 1 if model.tie_word_embeddings else 2
    return tables * vocabulary + model.num_layers * _attention(model, ranks) + mlps + norms


def kv_elements_per_token(model: ModelConfig, ranks: int) -> int:
    """Return the elements of one token's keys and values, over all layers."""
    return 2 * model.num_layers * _kv_features(model, ranks)


def _attention(model: ModelConfig, ranks: int) -> int:
    q = model.num_heads // ranks * model.head_dim
    qkv = q + 2 * _kv_features(model, ranks)
    biases = model.qkv_bias * qkv + model.output_bias * model.hidden_size
    norms = model.qk_norm * 2 * model.head_dim
    return (qkv + q) * model.hidden_size + biases + norms


def _mlp(model: ModelConfig, ranks: int) -> int:
    features = model.intermediate_size // ranks
    return 3 * features * model.hidden_size + model.mlp_bias * (2 * features + model.hidden_size)


def _experts(model: ModelConfig, ranks: int) -> int:
    assert model.experts is not None
    router = model.hidden_size
    expert = 3 * (model.experts.intermediate_size // ranks) * model.hidden_size
    return model.experts.num_experts * (router + expert)


def _kv_features(model: ModelConfig, ranks: int) -> int:
    return len(model.kv_heads_of_rank(0, ranks)) * model.head_dim
