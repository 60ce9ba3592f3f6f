"""Tiny random Hugging Face checkpoints of every supported family, made by transformers itself.

Norm weights and biases are random too: transformers starts them at ones and zeros, which would hide a wrong one.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

TINY: dict[str, Any] = {
    "vocab_size": 131,  # prime: no number of ranks divides it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# By architecture: transformers' name of the model type, and what differs from TINY.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"sliding_window": None}),
    "Qwen2ForCausalLM": ("qwen2", {"head_dim": 8}),  # transformers' Qwen2 has no head_dim of its own
    "Qwen3ForCausalLM": ("qwen3", {}),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "OlmoeForCausalLM": ("olmoe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}),
    "Ernie4_5_MoeForCausalLM": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2},
    ),
    "Glm4MoeForCausalLM": (
        "glm4_moe",
        {
            "use_qk_norm": True,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.7,
            "num_nextn_predict_layers": 0,
        },
    ),
    "MiniMaxM2ForCausalLM": (
        "minimax_m2",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "rotary_dim": 8},
    ),
    "Phi3ForCausalLM": ("phi3", {"head_dim": 8}),
    "SmolLM3ForCausalLM": ("smollm3", {"no_rope_layer_interval": 2}),
    "SeedOssForCausalLM": ("seed_oss", {"initializer_range": 0.12}),
    "GraniteForCausalLM": (
        "granite",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 0.5},
    ),
    "GraniteMoeHybridForCausalLM": (
        "granitemoehybrid",
        {
            "head_dim": 8,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
            "layer_types": ["full_attention", "full_attention"],
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
            "mamba_n_heads": 4,  # unused, but transformers checks it
        },
    ),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": ("olmo3", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen3_5ForCausalLM": (
        "qwen3_5_text",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 16,
            "partial_rotary_factor": 0.25,
        },
    ),
    "Qwen3_5MoeForCausalLM": (
        "qwen3_5_moe_text",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 16,
            "partial_rotary_factor": 0.25,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,  # that of the others: it is one more expert
        },
    ),
    "Exaone4ForCausalLM": ("exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "Ernie4_5ForCausalLM": ("ernie4_5", {}),
    "Ministral3ForCausalLM": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            }
        },
    ),
    "Gemma2ForCausalLM": (
        "gemma2",
        {
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "Gemma3ForCausalLM": ("gemma3_text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "GptOssForCausalLM": (
        "gpt_oss",
        {
            "intermediate_size": 48,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
        },
    ),
    "MellumForCausalLM": (
        "mellum",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of the family, in memory."""
    model_type, family = FAMILIES[architecture]
    config = AutoConfig.for_model(model_type, **{**TINY, **family, **overrides}, architectures=[architecture])
    if hasattr(config, "rotary_dim"):  # which older transformers do not read from here
        config.rope_parameters["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if hasattr(module, "limit") and hasattr(config, "swiglu_limit"):
            module.limit = config.swiglu_limit  # older transformers have a constant in gpt-oss
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("sinks"):
            nn.init.normal_(parameter, std=2.0)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    return model


def tiny_checkpoint(folder: Path, architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Save a `tiny_model` into `folder` and return it; its config.json is in the dialect of transformers 5."""
    model = tiny_model(architecture, seed, **overrides)
    model.save_pretrained(folder)
    return model


# By model type of the text part: those of the whole model and of its image part.
OUTER_MODELS = {
    "gemma3_text": ("gemma3", "siglip_vision_model"),
    "qwen3_5_text": ("qwen3_5", "qwen3_5_vision"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "qwen3_5_moe_vision"),
}


def image_checkpoint(folder: Path, text_type: str, naming: str) -> PreTrainedModel:
    """Save a random model of images and text, whose text tensors begin with `naming`, and return it."""
    family = next(family for kind, family in FAMILIES.values() if kind == text_type)
    outer, vision = OUTER_MODELS.get(text_type, ("mistral3", "pixtral"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        outer,
        text_config={"model_type": text_type, **TINY, **family},
        vision_config={"model_type": vision, **sizes, "image_size": 32, "patch_size": 16},
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    stored = "model.language_model." if text_type.startswith("qwen3_5") else "language_model.model."
    renamed = {name.replace(stored, naming): tensor for name, tensor in tensors.items()}
    renamed["mtp.fc.weight"] = torch.ones(2, 2)  # of speculative decoding, which is not supported
    save_file(renamed, folder / "model.safetensors")
    return model


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; a value of `...` removes the field."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def to_transformers4(folder: Path) -> None:
    """Rewrite config.json into the dialect of transformers 4: torch_dtype, rope_theta, rope_scaling."""
    config = json.loads((folder / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    rope = dict(rope.get("full_attention", rope))  # by layer type: only that of full attention can be scaled
    theta = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    rewrite_config(
        folder,
        dtype=...,
        torch_dtype=config["dtype"],
        rope_parameters=...,
        rope_theta=theta,
        rope_scaling=None if kind == "default" else {"type": kind, **rope},
    )


_CHARACTERS = string.printable[:95]
_PAIRS = [a + b for a, b in itertools.product('abc1, {}":', repeat=2)][: 131 - 3 - len(_CHARACTERS)]
ASCII_TEXTS = ["<pad>", "<bos>", "<eos>", *_CHARACTERS, *_PAIRS]


def ascii_checkpoint(folder: Path) -> Path:
    """Make a tiny random Llama with the 131 tokens of ASCII_TEXTS, and return its folder."""
    tiny_checkpoint(folder, "LlamaForCausalLM", max_position_embeddings=256)
    spelled = {text.replace(" ", "Ġ"): i for i, text in enumerate(ASCII_TEXTS)}
    assert len(spelled) == 131
    special = [
        {"id": i, "content": ASCII_TEXTS[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for i in range(3)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": spelled, "merges": [], "ignore_merges": True, "dropout": None,
                  "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
