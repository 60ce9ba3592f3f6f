"""FP8 checkpoints in every published layout, made of a checkpoint in float32, and the same model dequantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
Scales = Callable[[Tensor], Tensor]  # from a float32 matrix to scales that broadcast to it


class Layout(NamedTuple):
    """The scales of a matrix in a format, and the format's quantization_config."""

    scale_name: str
    scales: str  # "tensor", "row" or "block"
    stored: Callable[[Tensor], Tensor]  # from scales, [1, 1], [F, 1] or [blocks, blocks], to what the file holds
    config: dict[str, Any]
    extra: tuple[str, ...] = ()  # further scalars beside each weight
    modelopt_file: bool = False  # the configuration is in hf_quant_config.json


def _compressed(strategy: str, *, dynamic: bool = True, **weights: Any) -> dict[str, Any]:
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    inputs = {**kind, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    group = {"targets": ["Linear"], "weights": {**kind, "strategy": strategy, **weights}, "input_activations": inputs}
    ignored = ["lm_head", "re:.*mlp.gate$"]
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
        "ignore": ignored, "kv_cache_scheme": None, "sparsity_config": {}, "quantization_status": "compressed",
    }  # fmt: skip


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head", "*mlp.gate"]}


LAYOUTS = {
    "fp8 blocks": Layout(
        "weight_scale_inv",
        "block",
        lambda s: s,
        {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
                                       "in_proj_a", "in_proj_b"],
        },
    ),
    "fp8 tensor": Layout(
        "weight_scale",
        "tensor",
        lambda s: s.reshape(1),
        {"quant_method": "fp8", "activation_scheme": "static"},
        ("input_scale",),
    ),
    "compressed-tensors channel": Layout("weight_scale", "row", lambda s: s.bfloat16(), _compressed("channel")),
    "compressed-tensors tensor": Layout(
        "weight_scale", "tensor", lambda s: s.reshape(1), _compressed("tensor", dynamic=False), ("input_scale",)
    ),
    "compressed-tensors block": Layout(
        "weight_scale", "block", lambda s: s, _compressed("block", block_structure=[128, 128])
    ),
    "modelopt tensor": Layout(
        "weight_scale", "tensor", lambda s: s.reshape(()), _modelopt("FP8"), ("input_scale", "k_scale", "v_scale")
    ),
    "modelopt file": Layout(
        "weight_scale",
        "tensor",
        lambda s: s.reshape(()),
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}},
        ("input_scale",),
        modelopt_file=True,
    ),
    "modelopt channel": Layout(
        "weight_scale", "row", lambda s: s.reshape(-1), _modelopt("FP8_PER_CHANNEL_PER_TOKEN"), ("input_scale",)
    ),
    "modelopt block": Layout("weight_scale", "block", lambda s: s[:, None, :, None], _modelopt("FP8_PB_WO")),
    "fbgemm": Layout(
        "weight_scale",
        "row",
        lambda s: s,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
}  # fmt: skip


def is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a linear layer that formats quantize."""
    suffixes = "_proj", "_linear", "in_proj_qkv", "in_proj_z", ".w1", ".w2", ".w3"
    return name.endswith(tuple(f"{suffix}.weight" for suffix in suffixes))


def quantized(matrix: Tensor, granularity: str, stored: Callable[[Tensor], Tensor] = lambda s: s) -> tuple[Tensor, ...]:
    """Return FP8 numbers, the scales as stored, and the float32 matrix that both mean."""
    numbers, meant = torch.zeros_like(matrix, dtype=FP8), torch.zeros_like(matrix)
    rows, columns = matrix.shape
    down, across = {"tensor": (rows, columns), "row": (1, columns), "block": (128, 128)}[granularity]
    scales = torch.zeros(-(-rows // down), -(-columns // across))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            part = (slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across))
            scales[i, j] = matrix[part].abs().max() / 448
            scales[i, j] = stored(scales[i : i + 1, j : j + 1]).float().reshape(())  # as its dtype rounds it
            numbers[part] = (matrix[part] / scales[i, j]).clamp(-448, 448).to(FP8)
            meant[part] = numbers[part].float() * scales[i, j]
    return numbers, stored(scales), meant


def write_fp8(source: Path, target: Path, dequantized: Path, layout: Layout) -> None:
    """Write the checkpoint of `source` in a layout to `target`, and in float32 as it then means to `dequantized`."""
    fp8: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in _tensors(source):
        plain[name] = fp8[name] = tensor
        if is_linear(name):
            module = name.removesuffix(".weight")
            fp8[name], fp8[f"{module}.{layout.scale_name}"], plain[name] = quantized(
                tensor, layout.scales, layout.stored
            )
            fp8 |= {f"{module}.{extra}": torch.tensor(0.5) for extra in layout.extra}
    for folder, tensors in ((target, fp8), (dequantized, plain)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    if layout.modelopt_file:
        (target / "hf_quant_config.json").write_text(json.dumps(layout.config))
    else:
        set_quantization(target, layout.config)


def set_quantization(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()
