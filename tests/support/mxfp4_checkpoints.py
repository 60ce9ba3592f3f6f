"""Tiny random gpt-oss checkpoints whose experts are in MXFP4, and the same models as transformers dequantizes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints import rewrite_config, tiny_checkpoint

CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
SIZES = {"hidden_size": 64, "intermediate_size": 160}  # 5 blocks of intermediate features: no even number divides them


def mxfp4_checkpoint(folder: Path, **overrides: Any) -> PreTrainedModel:
    """Save a random model with MXFP4 experts into `folder`; return it with the numbers that these mean in float32."""
    model = tiny_checkpoint(folder, "GptOssForCausalLM", **{**SIZES, **overrides})
    tensors, weights = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape
        blocks, scales = packed(experts, rows, columns)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name].data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rewrite_config(folder, quantization_config=CONFIG)
    return model


def packed(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return random blocks [N, F, D / 32, 16] and scales [N, F, D / 32], as a checkpoint has them."""
    grid = experts, rows, columns // 32
    blocks = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
    return blocks, torch.randint(118, 124, grid, dtype=torch.uint8)
