"""The supported model families: a row for each, with its differences from the plain decoder.

To add a model, add its row to ARCHITECTURES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Windows = Literal["never", "always", "flagged", "flagged, upper layers", "flagged, unrotated layers", "layer types"]
Rotation = Literal["every layer", "no_rope_layers", "windowed layers", "by layer type", "position_embedding_type"]
ExpertLayers = Literal["sparse steps", "after the dense ones", "interval"]
Activation = Literal["silu", "gelu"]  # activation of an MLP's gate; GELU in its tanh form
QKNormKind = Literal["none", "each head", "all heads"]
Flag = bool | str  # whether something exists, or the field of config.json that says so


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """The names of a layer's tensors in the checkpoint, below `model.layers.<number>`.

    One name in place of several: that tensor has the rows of all, one after the other. A norm that is None does not
    exist.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norm_before_attention: str | None = "input_layernorm"
    norm_after_attention: str | None = None
    norm_before_mlp: str | None = "post_attention_layernorm"
    norm_after_mlp: str | None = None

    @property
    def has_norms_after(self) -> bool:
        return self.norm_after_attention is not None or self.norm_after_mlp is not None

    @property
    def norms(self) -> list[str]:
        """The norms that exist."""
        norms = self.norm_before_attention, self.norm_after_attention, self.norm_before_mlp, self.norm_after_mlp
        return [name for name in norms if name is not None]


@dataclass(frozen=True, kw_only=True)
class ExpertRules:
    """A family's mixture of experts: fields of config.json, the router, and names of tensors in a layer."""

    num_experts: str = "num_experts"
    num_per_token: str = "num_experts_per_tok"
    intermediate_size: str = "moe_intermediate_size"  # the field for the intermediate features of an expert
    layers: ExpertLayers = "sparse steps"
    normalized: Flag = "norm_topk_prob"  # the scores of a token's experts are scaled to sum up to 1
    least_sum: str | None = None  # the least divisor of that scaling
    scaling: str | None = None  # factor of the scores
    groups: bool = False  # n_group and topk_group apply
    shared_size: str | None = None  # intermediate features of the shared expert
    shared_count: str | None = None  # or their number in features of an expert

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    float32_router: bool = False  # the router computes in float32

    clamped: bool = False  # the experts are those of gpt-oss, and so is the router: GptOssMoE

    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: str | None = None  # the tensor that is added to the scores for the choice of experts
    bias_has_groups: bool = False  # its shape begins with a 1
    shared: str = "shared_experts"
    shared_gate: bool = False  # the shared expert is scaled by the sigmoid of a gate


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The differences of a model family from the plain decoder."""

    names: TensorNames = field(default_factory=TensorNames)
    intermediate_size: str = "intermediate_size"  # the field of config.json
    qkv_bias: Flag = False
    output_bias: Flag = False  # bias of the attention's output projection
    mlp_bias: Flag = False
    qk_norm: QKNormKind = "none"  # RMSNorm of each query and key head, or of all heads together
    qk_norm_flag: str | None = None  # the field of config.json that says whether there is one
    partial_rotary: bool = False  # partial_rotary_factor of config.json applies
    adjacent_pairs: bool = False  # elements 2 i and 2 i + 1 of a head are rotated as a pair, not i and E / 2 + i
    query_scaling: bool = False  # llama_4_scaling_beta of rope_parameters applies
    rotation: Rotation = "every layer"  # the layers with rotary positions
    # "fields": embedding_, residual_, attention_multiplier and logits_scaling of config.json apply. "by size": the
    # embedding is multiplied by sqrt(hidden_size), and the scores are divided by sqrt(query_pre_attn_scalar).
    multipliers: Literal["none", "fields", "by size"] = "none"
    softcaps: bool = False  # attn_logit_softcapping and final_logit_softcapping of config.json apply
    activation: Activation = "silu"
    zero_centred_norms: bool = False  # the weights of norms are those of config.json plus 1
    must_be_zero: tuple[str, ...] = ()  # fields of parts of the family that are not supported
    output_gate: bool = False  # each head of q_proj is followed by a gate of the head's result
    delta_net: bool = False  # layers of type linear_attention have the gated delta rule in place of attention
    experts: ExpertRules | None = None  # a mixture of experts in place of some MLPs
    sinks: bool = False  # each query head has a logit that takes its share of the softmax and adds nothing
    windows: Windows = "never"  # sliding_window of config.json applies; "flagged": if use_sliding_window is set
    defaults: Mapping[str, Any]  # fields that config.json may leave out, as in transformers' class of the family


GRANITE4_NAMES = TensorNames(gate_up=("shared_mlp.input_linear",), down="shared_mlp.output_linear")
NORMS_AFTER = TensorNames(
    norm_before_attention=None,
    norm_after_attention="post_attention_layernorm",
    norm_before_mlp=None,
    norm_after_mlp="post_feedforward_layernorm",
)
GEMMA_NAMES = TensorNames(
    norm_after_attention="post_attention_layernorm",
    norm_before_mlp="pre_feedforward_layernorm",
    norm_after_mlp="post_feedforward_layernorm",
)
PHI3_NAMES = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
QWEN2 = LLAMA | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
MISTRAL = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
PHI3 = LLAMA | {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip
SMOLLM3 = LLAMA | {
    "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "sliding_window": None,
    "no_rope_layer_interval": 4, "tie_word_embeddings": True,
}  # fmt: skip
SEED_OSS = LLAMA | {
    "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True,
}  # fmt: skip

GRANITE4 = LLAMA | {
    "shared_intermediate_size": 1024, "num_local_experts": 8, "layer_types": ["linear_attention"],
    "sliding_window": None,
}  # fmt: skip
ERNIE4_5 = LLAMA | {
    "vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2 = LLAMA | {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 2, "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA3 = GEMMA2 | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
MINISTRAL3 = MISTRAL | {
    "vocab_size": 131072, "num_hidden_layers": 34, "head_dim": 128, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5, "sliding_window": None,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip
OLMO2 = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
OLMO3 = OLMO2 | {"rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4}
QWEN3_5 = LLAMA | {
    "vocab_size": 248320, "intermediate_size": 12288, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "max_position_embeddings": 32768, "partial_rotary_factor": 0.25, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
QWEN3_5_MOE = QWEN3_5 | {
    "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2, "num_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
EXAONE4 = LLAMA | {
    "vocab_size": 102400, "intermediate_size": 16384, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
    "sliding_window": 4096, "sliding_window_pattern": 4,
}  # fmt: skip
QWEN2_MOE = QWEN3_MOE | {
    "intermediate_size": 5632, "num_key_value_heads": 16, "num_attention_heads": 16, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True,
}  # fmt: skip
OLMOE = LLAMA | {
    "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
    "num_experts_per_tok": 8,
}  # fmt: skip
ERNIE4_5_MOE = ERNIE4_5 | {
    "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": None, "moe_num_experts": 64, "moe_k": 6, "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}  # fmt: skip
GLM4_MOE = LLAMA | {
    "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1,
    "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
MINIMAX_M2 = LLAMA | {
    "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608,
    "rope_theta": 5e6, "num_local_experts": 256, "num_experts_per_tok": 8,
}  # fmt: skip
GPT_OSS = LLAMA | {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128, "sliding_window_pattern": 2,
    "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
    },
}  # fmt: skip
MELLUM = QWEN3_MOE | {
    "vocab_size": 98304, "hidden_size": 2304, "intermediate_size": 7168, "num_hidden_layers": 28, "head_dim": 128,
    "max_position_embeddings": 131072, "num_experts": 64, "moe_intermediate_size": 896, "norm_topk_prob": True,
    "sliding_window": 1024, "sliding_window_pattern": 1,
    "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}},
}  # fmt: skip

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", defaults=LLAMA
    ),
    "MistralForCausalLM": Architecture(windows="always", defaults=MISTRAL),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, windows="flagged, upper layers", defaults=QWEN2),
    "Qwen3ForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="each head", windows="flagged, upper layers",
        defaults=QWEN2 | {"head_dim": 128},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="each head", experts=ExpertRules(),
        windows="flagged", defaults=QWEN3_MOE,
    ),
    "Qwen2MoeForCausalLM": Architecture(
        qkv_bias="qkv_bias", must_be_zero=("use_sliding_window",), defaults=QWEN2_MOE,
        experts=ExpertRules(
            shared_size="shared_expert_intermediate_size", shared="shared_expert", shared_gate=True
        ),
    ),
    "OlmoeForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="all heads", must_be_zero=("clip_qkv",),
        experts=ExpertRules(intermediate_size="intermediate_size"), defaults=OLMOE,
    ),
    "Ernie4_5_MoeForCausalLM": Architecture(
        adjacent_pairs=True, must_be_zero=("use_bias",), defaults=ERNIE4_5_MOE,
        experts=ExpertRules(
            num_experts="moe_num_experts", num_per_token="moe_k", layers="interval", normalized=True,
            least_sum="moe_norm_min", shared_count="moe_num_shared_experts", float32_router=True,
            bias="mlp.moe_statics.e_score_correction_bias", bias_has_groups=True,
        ),
    ),
    "Glm4MoeForCausalLM": Architecture(
        qkv_bias="attention_bias", qk_norm="each head", qk_norm_flag="use_qk_norm", partial_rotary=True,
        experts=ExpertRules(
            num_experts="n_routed_experts", layers="after the dense ones", scaling="routed_scaling_factor", groups=True,
            shared_count="n_shared_experts", scoring="sigmoid", float32_router=True,
            bias="mlp.gate.e_score_correction_bias",
        ),
        defaults=GLM4_MOE,
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        qk_norm="all heads", partial_rotary=True, must_be_zero=("shared_intermediate_size",), defaults=MINIMAX_M2,
        experts=ExpertRules(
            num_experts="num_local_experts", intermediate_size="intermediate_size", normalized=True, scoring="sigmoid",
            block="block_sparse_moe", projections=("w1", "w3", "w2"), bias="block_sparse_moe.e_score_correction_bias",
        ),
    ),
    "Phi3ForCausalLM": Architecture(names=PHI3_NAMES, partial_rotary=True, windows="always", defaults=PHI3),
    "SmolLM3ForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias",
        rotation="no_rope_layers", windows="flagged, unrotated layers", defaults=SMOLLM3,
    ),
    "SeedOssForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_out_bias", mlp_bias="mlp_bias", defaults=SEED_OSS
    ),
    "GraniteForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias", multipliers="fields",
        defaults=LLAMA,
    ),
    "GraniteMoeHybridForCausalLM": Architecture(  # the dense models of Granite 4
        names=GRANITE4_NAMES, qkv_bias="attention_bias", output_bias="attention_bias", multipliers="fields",
        intermediate_size="shared_intermediate_size", rotation="position_embedding_type", windows="layer types",
        must_be_zero=("num_local_experts",), defaults=GRANITE4,
    ),
    "Olmo2ForCausalLM": Architecture(
        names=NORMS_AFTER, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="all heads", defaults=OLMO2
    ),
    "Olmo3ForCausalLM": Architecture(
        names=NORMS_AFTER, qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="all heads",
        rotation="by layer type", windows="layer types", defaults=OLMO3,
    ),
    "Qwen3_5ForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="each head", output_gate=True, delta_net=True,
        partial_rotary=True, zero_centred_norms=True, defaults=QWEN3_5,
    ),
    "Qwen3_5MoeForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="each head", output_gate=True, delta_net=True,
        partial_rotary=True, zero_centred_norms=True, defaults=QWEN3_5_MOE,
        experts=ExpertRules(
            normalized=True, shared_size="shared_expert_intermediate_size", shared="shared_expert", shared_gate=True
        ),
    ),
    "Exaone4ForCausalLM": Architecture(
        names=NORMS_AFTER, qk_norm="each head", rotation="windowed layers", windows="layer types", defaults=EXAONE4
    ),
    "Ernie4_5ForCausalLM": Architecture(
        qkv_bias="use_bias", output_bias="use_bias", mlp_bias="use_bias", adjacent_pairs=True, defaults=ERNIE4_5
    ),
    "Gemma2ForCausalLM": Architecture(
        names=GEMMA_NAMES, qkv_bias="attention_bias", output_bias="attention_bias", zero_centred_norms=True,
        activation="gelu", multipliers="by size", softcaps=True, must_be_zero=("use_bidirectional_attention",),
        windows="layer types", defaults=GEMMA2,
    ),
    "Gemma3ForCausalLM": Architecture(
        names=GEMMA_NAMES, qkv_bias="attention_bias", output_bias="attention_bias", zero_centred_norms=True,
        qk_norm="each head", activation="gelu", multipliers="by size", softcaps=True,
        must_be_zero=("use_bidirectional_attention",), rotation="by layer type", windows="layer types",
        defaults=GEMMA3,
    ),
    "Ministral3ForCausalLM": Architecture(query_scaling=True, windows="always", defaults=MINISTRAL3),
    "GptOssForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", sinks=True, windows="layer types", defaults=GPT_OSS,
        experts=ExpertRules(num_experts="num_local_experts", intermediate_size="intermediate_size", clamped=True),
    ),
    "MellumForCausalLM": Architecture(
        qkv_bias="attention_bias", output_bias="attention_bias", qk_norm="each head", experts=ExpertRules(),
        rotation="by layer type", windows="layer types", defaults=MELLUM,
    ),
}  # fmt: skip

# The text part of models that also see images: its family by model_type of text_config.
TEXT_PARTS = {
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Qwen3_5ForConditionalGeneration": {"qwen3_5_text": "Qwen3_5ForCausalLM"},
    "Qwen3_5MoeForConditionalGeneration": {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"},
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
}
