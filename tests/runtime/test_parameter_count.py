"""The parameter count from the config against the allocation of each rank's Decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.runtime.config import Config
from lockstep.runtime.memory.memory_plan import plan_weights
from lockstep.runtime.memory.parameter_count import (
    kv_elements_per_token,
    parameters_of_rank,
    parameters_per_token,
)
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.families import ARCHITECTURES
from lockstep.runtime.model.model_config import DTYPES, ModelConfig

from ranks import ThreadGroup

Configs = dict[str, Any]
FLAGS = st.booleans()
LAYERS = "full_attention", "linear_attention"


@st.composite
def configs(draw: st.DrawFn) -> Configs:
    """A config.json of any family, with everything that changes what there is to allocate."""
    kv_heads, layers = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 4))
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES)))
    dense = {"num_local_experts": 0, "shared_intermediate_size": 24, "layer_types": ["full_attention"] * layers}
    hybrid = {"layer_types": ["full_attention", *draw(st.lists(st.sampled_from(LAYERS), min_size=3))][:layers]}
    return {
        "architectures": [architecture],
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": 24 * draw(st.integers(1, 3)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 4, 6])),
        "num_key_value_heads": kv_heads,
        "head_dim": 8 * draw(st.integers(1, 3)),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(FLAGS),
        "attention_bias": draw(FLAGS),
        "mlp_bias": draw(FLAGS),
        **dict.fromkeys(("num_experts", "moe_num_experts", "n_routed_experts"), draw(st.integers(2, 5))),
        **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
        **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), draw(st.integers(0, 2))),
        "shared_expert_intermediate_size": 24 * draw(st.integers(1, 2)),
        "use_qk_norm": draw(FLAGS),
        "moe_intermediate_size": 24 * draw(st.integers(1, 2)),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1))),
    } | (dense if "MoeHybrid" in architecture else hybrid if "Qwen3_5" in architecture else {})


def sketch(model: ModelConfig, rank: int, size: int, dtype: torch.dtype) -> Decoder:
    """The rank's Decoder, allocated nowhere."""
    comm = ThreadGroup(size).rank(rank)
    return Decoder(model, comm, dtype=dtype, device=torch.device("meta"), max_positions=1)


@given(configs(), st.data())
def test_parameter_count_equals_allocation_of_every_rank(hf: Configs, data: st.DataObject) -> None:
    model = ModelConfig.from_hf(hf)
    has_experts = model.experts is not None and bool(model.experts.layers)
    model = model.with_expert_parallel(has_experts and data.draw(FLAGS, "whole experts"))
    size = data.draw(st.integers(1, model.max_tensor_parallel_size), "size")
    rank = data.draw(st.integers(0, size - 1), "rank")
    decoder = sketch(model, rank, size, torch.float32)
    assert parameters_of_rank(model, size, rank) == sum(weight.tensor.numel() for weight in decoder.weights)
    page_size = 16
    assert (
        kv_elements_per_token(model, size, rank) * page_size * 4
        == decoder.attention_shape(page_size, torch.float32).page_bytes
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2])
def test_memory_plan_uses_the_itemsize_of_the_resolved_dtype(dtype: Any, size: int) -> None:
    requested = Config(dtype=dtype, tensor_parallel_size=size, page_size=8)
    model = ModelConfig.from_folder(requested.model)
    config = requested.resolved(model, cuda=False)
    decoder, plan = sketch(model, 0, size, config.torch_dtype), plan_weights(config, model)
    assert plan.weights == sum(weight.tensor.nbytes for weight in decoder.weights)
    assert plan.page_bytes == decoder.attention_shape(8, config.torch_dtype).page_bytes


def test_memory_plan_refuses_an_impossible_split() -> None:
    config = Config(tensor_parallel_size=5)
    model = ModelConfig.from_folder(config.model)
    with pytest.raises(ValueError, match=r"4 attention heads .* over 5 ranks"):
        plan_weights(config.resolved(model, cuda=False), model)


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
         "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
         "max_position_embeddings": 40960, "tie_word_embeddings": True}  # fmt: skip
EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48,
           "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
           "moe_intermediate_size": 768, "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.parametrize(
    ("hf", "ranks", "published"),
    [(QWEN3, 1, 0.44e9), (QWEN3 | EXPERTS, 1, 3.3e9 - 2 * 151936 * 2048), (QWEN3 | EXPERTS, 2, 1.34e9)],
    ids=["Qwen3-0.6B", "Qwen3-30B-A3B", "half of it"],
)
def test_parameters_per_token_are_those_that_are_published_as_active(hf: Configs, ranks: int, published: float) -> None:
    model = ModelConfig.from_hf(hf)
    assert parameters_per_token(model, ranks) == pytest.approx(published, rel=0.03)
    assert parameters_per_token(model.with_expert_parallel(model.experts is not None), ranks) == pytest.approx(
        published, rel=0.03
    )
