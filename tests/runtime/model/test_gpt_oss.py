"""gpt-oss in MXFP4 against transformers' dequantization: tokens, memory, the format itself, damaged checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lockstep.comm.base import SingleRank
from lockstep.kernels.arguments import MXFP4Weight
from lockstep.kernels.mxfp4_order import ordered_mxfp4, published_mxfp4, published_scales
from lockstep.runtime.config import Config
from lockstep.runtime.memory.memory_plan import plan_weights
from lockstep.runtime.model.checkpoint import read_model
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.weights import fill_dummy, load_weights

from checkpoints import rewrite_config, tiny_checkpoint
from engines import request, run_engine
from mxfp4_checkpoints import mxfp4_checkpoint, packed
from ranks import ThreadGroup

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def test_every_number_and_scale_is_that_of_transformers() -> None:
    pairs = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).clamp(max=252).view(1, 256, 1).expand(1, 256, 16).contiguous()
    expected = convert_moe_packed_tensors(pairs, scales, dtype=torch.float32).transpose(1, 2)
    weight = MXFP4Weight.of_checkpoint(pairs.flatten(2), scales)
    assert torch.equal(weight.dequantized(torch.float32), expected)
    assert torch.equal(weight.expert(0), expected[0])
    assert weight.shape == expected.shape
    blocks, scales = packed(3, 16, 96)
    expected = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert torch.equal(MXFP4Weight.of_checkpoint(blocks.flatten(2), scales).dequantized(torch.bfloat16), expected)


@pytest.mark.parametrize("blocks", [1, 3, 4, 10])
def test_the_order_in_memory_is_reversible(blocks: int) -> None:
    data, scales = (torch.randint(0, 256, (3, 16, blocks * n), dtype=torch.uint8) for n in (16, 1))
    weight = MXFP4Weight.of_checkpoint(data, scales)
    assert (weight.data.shape, weight.scales.shape) == (data.shape, scales.shape)
    assert torch.equal(published_mxfp4(weight.data), data)
    assert torch.equal(published_scales(weight.scales), scales)
    assert torch.equal(ordered_mxfp4(published_mxfp4(data)), data)


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.nightly), 4])
def test_greedy_tokens_equal_those_of_transformers(tmp_path: Path, tp: int) -> None:
    model = mxfp4_checkpoint(tmp_path)
    prefix = list(range(5, 26))
    prompts = [[*prefix, 30, 31, 32], [*prefix, 40], [7] * 30, [3]]
    requests = [request(n, prompt, max_tokens=64) for n, prompt in enumerate(prompts)]
    few = {"num_pages": 60, "max_num_seqs": 4, "max_num_batched_tokens": 7}
    results = run_engine(tmp_path, requests, tp=tp, **few)  # type: ignore[arg-type]
    assert results.preemptions > 0
    assert results.cached[1] > 0
    for n, prompt in enumerate(prompts):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert results.tokens[n] == whole[0, len(prompt) :].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"deterministic": True}], ids=str)
def test_bfloat16_on_gpu_is_close_to_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    """One token after another of each prompt, and log-probabilities of those that were chosen."""
    sizes = {"head_dim": 64, "hidden_size": 256, "sliding_window": 20, "num_experts_per_tok": 6}  # all of the experts
    model = mxfp4_checkpoint(tmp_path, **sizes)
    prompts = [list(range(5, 45)), [7] * 30, [3]]
    requests = [request(n, prompt, logprobs=1) for n, prompt in enumerate(prompts)]
    actual = run_engine(tmp_path, requests, device="cuda", dtype="bfloat16", **options)
    for n, prompt in enumerate(prompts):
        part = slice(len(prompt) - 1, -1)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + actual.tokens[n]])).logits[0, part].log_softmax(-1)
        for row, token, got in zip(expected, actual.tokens[n], actual.logprobs[n], strict=True):
            assert got.token == pytest.approx(float(row[token]), abs=0.3)


@pytest.mark.parametrize("mxfp4", [True, False])
def test_memory_plan_and_dummy_weights(tmp_path: Path, mxfp4: bool) -> None:
    mxfp4_checkpoint(tmp_path) if mxfp4 else tiny_checkpoint(tmp_path, "GptOssForCausalLM", intermediate_size=40)
    model = ModelConfig.from_folder(tmp_path)
    for size in (1, 3, 4):
        config = Config(model=str(tmp_path), tensor_parallel_size=size).resolved(model, cuda=False)
        for rank in range(size):
            comm = ThreadGroup(size).rank(rank)
            decoder = Decoder(model, comm, dtype=torch.float32, device=CPU, max_positions=8)
            fill_dummy(decoder.weights)
            assert all(weight.tensor.float().abs().max() > 0 for weight in decoder.weights)
            plan = plan_weights(config, model, rank)
            assert plan.weights == sum(weight.tensor.nbytes for weight in decoder.weights)
    if mxfp4:
        elements = 6 * 3 * 64 * 160 * model.num_layers
        assert sum(w.tensor.nbytes for w in decoder.weights if w.tensor.dtype == torch.uint8) < elements


def _change_tensors(change: Callable[[dict[str, Tensor]], object], folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _load(folder: Path) -> None:
    decoder = Decoder(read_model(Config(), folder), SingleRank(), dtype=torch.float32, device=CPU, max_positions=8)
    load_weights(decoder.weights, folder)


EXPERTS = "model.layers.1.mlp.experts"
SINKS = "model.layers.0.self_attn.sinks"
DAMAGES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str]] = {
    "sinks of another shape": ({}, lambda t: t.update({SINKS: torch.zeros(5)}), rf"{SINKS} \[5\] instead of \[4\]"),
    "sinks missing": ({}, lambda t: t.pop(SINKS), f"1 missing: {SINKS}"),
    "sink not finite": ({}, lambda t: t[SINKS].fill_(torch.nan), f"NaN or infinite numbers in {SINKS}"),
    "scales missing": ({}, lambda t: t.pop(f"{EXPERTS}.down_proj_scales"), "1 missing: .*down_proj_scales"),
    "scale too large": (
        {},
        lambda t: t[f"{EXPERTS}.down_proj_scales"][0, 3, 1].fill_(255),
        "NaN or infinite numbers in .*down_proj_scales",
    ),
    "blocks in bfloat16": (
        {},
        lambda t: t.update({f"{EXPERTS}.down_proj_blocks": t[f"{EXPERTS}.down_proj_blocks"].bfloat16()}),
        "down_proj_blocks is BF16 instead of U8",
    ),
    "blocks that do not divide": ({"intermediate_size": 150}, dict, "blocks of 32 numbers, which must divide"),
    "FP8": ({"quantization_config": {"quant_method": "fp8"}}, dict, "FP8 weights of GptOssForCausalLM are not"),
    "other family": ({"architectures": ["MistralForCausalLM"]}, dict, r"\(mxfp4\) is not supported for MistralFor"),
    "layer types": ({"layer_types": ["sliding_attention"]}, dict, "layer_types has 1 entries"),
    "top-k": ({"num_experts_per_tok": 7}, dict, "it must be at most num_local_experts, 6"),
    "limit": ({"swiglu_limit": 0}, dict, "swiglu_limit is 0, it must be a number above 0"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_that_cannot_be_used_is_one_line(tmp_path: Path, damage: str) -> None:
    changes, change, message = DAMAGES[damage]
    mxfp4_checkpoint(tmp_path)
    rewrite_config(tmp_path, **changes)
    _change_tensors(change, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        _load(tmp_path)
    assert "\n" not in str(error.value)


def test_options_that_mxfp4_excludes_are_refused(tmp_path: Path) -> None:
    mxfp4_checkpoint(tmp_path, num_attention_heads=8)
    model = ModelConfig.from_folder(tmp_path)
    with pytest.raises(ValueError, match="5 blocks of 32 intermediate features cannot be split over 6 ranks"):
        model.check_tensor_parallel(6)
    with pytest.raises(ValueError, match="FP8 weights of GptOssForCausalLM are not supported"):
        model.quantized_by("fp8")
    config = Config(model=str(tmp_path), dtype="float16").resolved(model, cuda=True)
    with pytest.raises(ValueError, match="dtype='float16' cannot be used: MXFP4 experts need bfloat16 on a GPU"):
        plan_weights(config, model)


def test_published_config_is_read(tmp_path: Path) -> None:
    """The config.json of gpt-oss-20b, in the dialect of transformers 4."""
    published = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
        "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 8, "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = ModelConfig.from_folder(tmp_path)
    assert model.windows == (128, None) * 12
    assert (model.max_position_embeddings, model.sinks) == (131072, True)
    assert model.experts is not None
    assert (model.experts.clamped, model.experts.mxfp4) == ((1.702, 7.0), True)
    config = Config(model=str(tmp_path), dtype="bfloat16").resolved(model, cuda=False)
    assert plan_weights(config, model).weights == pytest.approx(13.76e9, rel=0.02)  # the files of the checkpoint
