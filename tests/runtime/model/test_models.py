"""Whole models of every family against transformers, on tiny random checkpoints; ModelConfig from config.json."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lockstep.comm.base import Communicator
from lockstep.kernels.arguments import StateRows
from lockstep.runtime.model.attention.backend import TorchAttention
from lockstep.runtime.model.batch import Batch, HostBatch
from lockstep.runtime.model.checkpoint import fit_weights
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.families import ARCHITECTURES
from lockstep.runtime.model.kv_pool import KVLayout, KVPool
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.rope import RopeConfig
from lockstep.runtime.model.state_pool import StatePool
from lockstep.runtime.model.weights import load_weights

from checkpoints import FAMILIES, image_checkpoint, rewrite_config, tiny_checkpoint, to_transformers4
from mxfp4_checkpoints import mxfp4_checkpoint
from ranks import run_ranks

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # float32; the order of sums differs from transformers
LENGTHS = (1, 9, 47, 30)
WINDOW = 8  # several times smaller than the longest prompt
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
LONGROPE = {  # both lists are equal: transformers chooses by the length of a prompt, lockstep by that of the context
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 4.0], "long_factor": [1.0, 1.1, 1.3, 2.0, 2.5, 4.0],
}  # fmt: skip
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}

# Each family as it is, then each thing in which checkpoints of a family differ.
CASES: dict[str, tuple[str, dict[str, Any]]] = {name.removesuffix("ForCausalLM"): (name, {}) for name in FAMILIES} | {
    "Llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "Llama llama3 rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "Llama linear rope": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "Llama no GQA": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "Mistral window": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "Qwen2 yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "Qwen2 window in layer 1": ("Qwen2ForCausalLM", {**SLIDING, "max_window_layers": 1}),
    "Qwen2 window unused": ("Qwen2ForCausalLM", {"sliding_window": WINDOW, "max_window_layers": 0}),
    "Qwen3 tied biases": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    "Qwen3 layer types": ("Qwen3ForCausalLM", {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}),
    "Qwen3Moe scores as they are": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}),
    "Qwen3Moe dense layers": (
        "Qwen3MoeForCausalLM", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "Qwen3Moe window": ("Qwen3MoeForCausalLM", SLIDING),
    "Qwen2Moe tied dense layer": ("Qwen2MoeForCausalLM", {
        "tie_word_embeddings": True, "num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True,
        "qkv_bias": False,
    }),
    "Olmoe biases": ("OlmoeForCausalLM", {"attention_bias": True, "norm_topk_prob": True}),
    "Ernie4_5_Moe dense layers": ("Ernie4_5_MoeForCausalLM", {
        "num_hidden_layers": 5, "moe_layer_start_index": 0, "moe_layer_end_index": 3,
        "moe_layer_interval": 2, "moe_norm_min": 0.9, "tie_word_embeddings": True,
    }),
    "Ernie4_5_Moe no shared experts": ("Ernie4_5_MoeForCausalLM", {"moe_num_shared_experts": 0}),
    "Glm4Moe biases": ("Glm4MoeForCausalLM", {
        "attention_bias": True, "use_qk_norm": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "num_hidden_layers": 3, "first_k_dense_replace": 2, "n_shared_experts": 2,
    }),
    "Phi3 mini": ("Phi3ForCausalLM", {
        "tie_word_embeddings": True, "head_dim": 16, "hidden_size": 64, "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
    }),
    "Phi3 heads of 96": ("Phi3ForCausalLM", {"head_dim": 96, "hidden_size": 64}),
    "Phi3 window": ("Phi3ForCausalLM", {"sliding_window": WINDOW}),
    "SmolLM3 tied biases window": ("SmolLM3ForCausalLM", {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "use_sliding_window": True,
        "sliding_window": WINDOW, "num_hidden_layers": 4, "no_rope_layers": None, "no_rope_layer_interval": 2,
    }),
    "Granite tied biases": (
        "GraniteForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "GraniteMoeHybrid unrotated": ("GraniteMoeHybridForCausalLM", {"position_embedding_type": None}),
    "Olmo2 biases yarn": ("Olmo2ForCausalLM", {"attention_bias": True, "rope_parameters": YARN}),
    "Olmo3 rope by layer type": ("Olmo3ForCausalLM", {
        "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    }),
    "Olmo3 layer types left out": ("Olmo3ForCausalLM", {"layer_types": None, "num_hidden_layers": 4}),
    "Ernie4_5 tied biases": ("Ernie4_5ForCausalLM", {"tie_word_embeddings": True, "use_bias": True}),
    "Gemma2 no softcaps": (
        "Gemma2ForCausalLM",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True},
    ),
    "Gemma3 rope and biases": ("Gemma3ForCausalLM", {
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "attention_bias": True, "query_pre_attn_scalar": 40,
    }),
    "Ministral3 window": ("Ministral3ForCausalLM", {"sliding_window": WINDOW}),
    "Exaone4 no window": (
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3},
    ),
    "Mellum dense layer": ("MellumForCausalLM", {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"], "norm_topk_prob": False,
        "rope_parameters": {
            "full_attention": YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    "GptOss MXFP4": ("GptOssForCausalLM", {"num_hidden_layers": 3}),
    "GptOss small limit": ("GptOssForCausalLM", {"swiglu_limit": 0.3, "swiglu_alpha": 1.1}),
    "GptOss no biases": ("GptOssForCausalLM", {"attention_bias": False}),
    "SeedOss biases": ("SeedOssForCausalLM", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
}  # fmt: skip

Step = list[tuple[int, int, int]]  # (sequence, first position, end position) of each row


@functools.cache
def _prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 131, (length,), generator=generator) for length in LENGTHS]


def _whole() -> list[Step]:
    return [[(n, 0, length) for n, length in enumerate(LENGTHS)]]


def _chunked() -> list[Step]:
    """Each step takes 1 to 11 tokens of every unfinished sequence, so that decode and prefill rows meet in a batch."""
    steps, done = [], [0] * len(LENGTHS)
    while any(d < length for d, length in zip(done, LENGTHS, strict=True)):
        step = []
        for n, length in enumerate(LENGTHS):
            stop = min(done[n] + (5, 1, 11, 1, 1, 3)[(len(steps) + n) % 6], length)
            if stop > done[n]:
                step.append((n, done[n], stop))
            done[n] = stop
        steps.append(step)
    return steps


def _batch(step: Step, tables: Tensor, page_size: int) -> Batch:
    positions = torch.cat([torch.arange(start, stop) for _, start, stop in step])
    rows = torch.cat([torch.full((stop - start,), n) for n, start, stop in step])
    kv_slots = (tables[:, rows, positions // page_size] * page_size + positions % page_size).int()
    host = HostBatch(
        slots=rows.int().numpy(),
        positions=positions.int().numpy(),
        kv_slots=kv_slots.numpy(),
        page_table=tables[:, [n for n, _, _ in step]].int().numpy(),
        query_starts=np.cumsum([0] + [stop - start for _, start, stop in step], dtype=np.int32),
        kv_lengths=np.array([stop for _, _, stop in step], dtype=np.int32),
        num_decoding=0,
    )
    return Batch(
        token_ids=torch.cat([_prompts()[n][start:stop] for n, start, stop in step]).int(),
        positions=positions.int(),
        kv_slots=kv_slots,
        page_table_rows=rows.int(),
        device_page_table=tables.int(),
        host=host,
        state_rows=StateRows(torch.tensor([n for n, _, _ in step]).int(), torch.from_numpy(host.query_starts)),
    )


def _tables(page_size: int, num_groups: int) -> tuple[Tensor, int]:
    """Shuffled pages for each sequence and group of layers; what lies beyond a sequence is no page at all."""
    counts = [-(-length // page_size) for length in LENGTHS]
    total = num_groups * sum(counts)
    pages = torch.randperm(total, generator=torch.Generator().manual_seed(2)).split(counts * num_groups)
    tables = torch.full((num_groups, len(LENGTHS), max(counts) + 1), 10**9)
    for row, row_pages in zip(tables.flatten(0, 1), pages, strict=True):
        row[: len(row_pages)] = row_pages
    return tables, total


def _logits(
    comm: Communicator, folder: Path, steps: list[Step], page_size: int = 16, layout: KVLayout = "layer-first"
) -> list[Tensor]:
    """The logits [length, vocab] of each prompt, computed step by step on this rank."""
    config = ModelConfig.from_folder(folder)
    decoder = Decoder(config, comm, dtype=torch.float32, device=CPU, max_positions=config.max_position_embeddings)
    load_weights(decoder.weights, folder)
    tables, num_pages = _tables(page_size, 1 + config.layer_groups.num_window_groups)
    pool = KVPool(decoder.attention_shape(page_size, torch.float32), num_pages, CPU, layout)
    state_shape = decoder.state_shape(torch.float32)
    states = None if state_shape is None else StatePool(state_shape, len(LENGTHS), CPU)
    attention = TorchAttention(config.attention_multiplier, config.attention_softcap)
    parts: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step in steps:
        batch = _batch(step, tables, page_size)
        attention.plan(batch)
        logits = decoder.logits(decoder.forward(batch, pool, attention, states)).gather()
        for (n, _, _), part in zip(step, logits.split(np.diff(batch.host.query_starts).tolist()), strict=True):
            parts[n].append(part)
    return [torch.cat(part) for part in parts]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A checkpoint and the logits that transformers computes with it for each prompt."""
    architecture, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    make = (
        mxfp4_checkpoint if "MXFP4" in request.param else functools.partial(tiny_checkpoint, architecture=architecture)
    )
    model = make(folder, **overrides)
    with torch.inference_mode():
        return folder, [model(prompt[None]).logits[0] for prompt in _prompts()]


def _assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert max(e.abs().max() for e in expected) > 0.5  # else the tolerance would say nothing
    for f, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(f, e, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [1, *(pytest.param(size, marks=pytest.mark.nightly) for size in (2, 3)), 4])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_logits_match_transformers(case: tuple[Path, list[Tensor]], size: int) -> None:
    folder, expected = case
    for whole in run_ranks(size, lambda comm: _logits(comm, folder, _whole())):
        _assert_close(whole, expected)
    for chunked in run_ranks(size, lambda comm: _logits(comm, folder, _chunked(), page_size=4, layout="page-first")):
        _assert_close(chunked, expected)


@pytest.mark.parametrize("naming", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize("text_type", ["mistral", "ministral3", "gemma3_text", "qwen3_5_text", "qwen3_5_moe_text"])
def test_text_part_of_a_model_with_images_matches_transformers(tmp_path: Path, text_type: str, naming: str) -> None:
    model = image_checkpoint(tmp_path, text_type, naming)
    with torch.inference_mode():
        expected = [model(input_ids=prompt[None]).logits[0] for prompt in _prompts()]
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    assert not fit_weights(ModelConfig.from_folder(tmp_path), tmp_path).tie_word_embeddings
    for logits in run_ranks(2, lambda comm: _logits(comm, tmp_path, _chunked())):
        _assert_close(logits, expected)


def test_experts_in_one_tensor_are_those_in_one_for_each(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "Qwen3_5MoeForCausalLM")
    expected = run_ranks(2, lambda comm: _logits(comm, tmp_path, _whole()))[0]
    file, experts = tmp_path / "model.safetensors", range(4)
    tensors = load_file(file)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            [tensors.pop(f"{prefix}.{n}.{x}_proj.weight") for n in experts] for x in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((torch.stack(gate), torch.stack(up)), dim=1)
        tensors[f"{prefix}.down_proj"] = torch.stack(down)
    save_file(tensors, file)
    assert not fit_weights(ModelConfig.from_folder(tmp_path), tmp_path).tie_word_embeddings
    for logits in run_ranks(2, lambda comm: _logits(comm, tmp_path, _whole())):
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@pytest.mark.parametrize("case", ["Qwen3"], indirect=True)
@pytest.mark.parametrize("steps", [_whole, _chunked])
def test_pages_and_layouts_give_bitwise_equal_logits(case: tuple[Path, list[Tensor]], steps: Any) -> None:
    folder, _ = case
    reference = run_ranks(2, lambda comm: _logits(comm, folder, steps()))[0]
    page_first = run_ranks(2, lambda comm: _logits(comm, folder, steps(), layout="page-first"))[0]
    assert all(torch.equal(a, b) for a, b in zip(reference, page_first, strict=True))
    # Another page size pads the keys to another length, so only the order of sums may differ.
    _assert_close(run_ranks(2, lambda comm: _logits(comm, folder, steps(), page_size=1))[0], reference)


@pytest.mark.parametrize("case", [name for name in CASES if "Mellum" not in name], indirect=True)
def test_both_formats_of_config_json_give_one_config(case: tuple[Path, list[Tensor]], tmp_path: Path) -> None:
    folder, _ = case
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "generation_config.json", tmp_path)
    to_transformers4(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "torch_dtype" in written
    assert not {"dtype", "rope_parameters"} & set(written)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_folder(folder)


def test_every_architecture_is_tested() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip


PHI3 = {"architectures": ["Phi3ForCausalLM"], "num_attention_heads": 8}
GRANITE4 = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0, "layer_types": ["attention"] * 2,
}  # fmt: skip
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"]}
GLM4_MOE = {"architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 8, "num_experts_per_tok": 3}
ERNIE_MOE = {"architectures": ["Ernie4_5_MoeForCausalLM"]}
MELLUM = {"architectures": ["MellumForCausalLM"]}
SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}


def test_defaults_of_a_minimal_config() -> None:
    config = ModelConfig.from_hf(HF)
    assert (config.head_dim, config.norm_eps) == (2, 1e-6)
    assert config.ropes == (RopeConfig(theta=10000.0),) * 2
    assert (config.dtype, config.eos_token_ids, config.windows) == ("bfloat16", (), (None, None))


def test_mistral_window_unless_null() -> None:
    mistral = {**HF, "architectures": ["MistralForCausalLM"]}
    assert ModelConfig.from_hf(mistral).windows[0] == 4096  # as transformers
    assert ModelConfig.from_hf({**mistral, "sliding_window": None}).windows[0] is None


def test_window_of_upper_layers_without_layer_types() -> None:
    qwen = {**HF, **SLIDING, "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 4, "max_window_layers": 1}
    assert ModelConfig.from_hf(qwen).windows == (None, WINDOW, WINDOW, WINDOW)
    assert ModelConfig.from_hf({**qwen, "max_window_layers": 0}).windows == (WINDOW,) * 4
    assert ModelConfig.from_hf({**qwen, "use_sliding_window": False}).windows == (None,) * 4


def test_yarn_extends_the_positions() -> None:
    assert ModelConfig.from_hf({**HF, "rope_scaling": YARN}).max_position_embeddings == 128
    assert ModelConfig.from_hf({**HF, "rope_scaling": {**LLAMA3, "factor": 16.0}}).max_position_embeddings == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported.*Llama.*Qwen3Moe"),
        ({"architectures": None}, "architecture not given is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'.*default, .*, longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling has no factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**PHI3, "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({**PHI3, "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 rotates 3 of 8 elements of a head"),
        ({**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "has no long_factor"),
        ({**PHI3, "rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [0]}}, r"long_factor is \[0\]"),
        (
            {**PHI3, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
            "long_factor has 3 numbers; it must have one for each of 4 pairs",
        ),
        ({**SMOLLM3, "no_rope_layers": [1]}, r"no_rope_layers is \[1\].* each of the 2 layers"),
        ({**SMOLLM3, "no_rope_layers": [1, 2]}, r"no_rope_layers is \[1, 2\].*a 1 or a 0"),
        ({**SMOLLM3, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"architectures": ["SeedOssForCausalLM"], "attention_out_bias": "no"}, "attention_out_bias is 'no'"),
        ({"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0}, "residual_multiplier is 0"),
        ({**GRANITE4, "num_local_experts": 62}, "num_local_experts is 62; only models without it"),
        ({**GRANITE4, "layer_types": ["mamba", "attention"]}, "layer_types has 'mamba'; the supported ones"),
        ({**GRANITE4, "layer_types": None}, "config.json has no sliding_window_pattern"),
        ({name: x for name, x in GRANITE4.items() if name != "layer_types"}, "layer_types has 'linear_attention'"),
        ({"architectures": ["Olmo3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        (
            {"architectures": ["Olmo3ForCausalLM"], "rope_parameters": {"chunked_attention": {}, "rope_type": "yarn"}},
            "rope_parameters has 'chunked_attention', 'rope_type'; it must have",
        ),
        ({"architectures": ["Exaone4ForCausalLM"], "sliding_window_pattern": "LG"}, "sliding_window_pattern is 'LG'"),
        ({"architectures": ["Ernie4_5ForCausalLM"], "use_bias": 1}, "use_bias is 1"),
        (
            {"architectures": ["Ministral3ForCausalLM"], "rope_parameters": YARN},
            "rope_parameters has no llama_4_scaling_beta",
        ),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}},
            "text_config: model_type 'mistral4' is not supported; the supported ones are mistral, ministral3",
        ),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": []}, "text_config is"),
        ({**GEMMA3, "hidden_activation": "relu"}, "hidden_activation 'relu'.*gelu_pytorch_tanh"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({**GEMMA3, "attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        ({**GLM4_MOE, "n_group": 3}, "n_group is 3; it must divide the 8 experts into groups of two or more"),
        ({**GLM4_MOE, "n_group": 8}, "n_group is 8; it must divide the 8 experts into groups of two or more"),
        ({**GLM4_MOE, "n_group": 4, "topk_group": 5}, "topk_group is 5; it must be at most n_group, 4"),
        ({**GLM4_MOE, "n_group": 4, "topk_group": 1}, "topk_group is 1; .* so many groups must have 3 experts"),
        ({**GLM4_MOE, "scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; it must be 'sigmoid'"),
        ({**GLM4_MOE, "routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({**GLM4_MOE, "first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({**GLM4_MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be at most n_routed_experts, 8"),
        ({**ERNIE_MOE, "use_bias": True}, "use_bias is True; only models without it"),
        ({**ERNIE_MOE, "moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ({"architectures": ["OlmoeForCausalLM"], "clip_qkv": 8.0}, "clip_qkv is 8.0; only models without it"),
        ({"architectures": ["Qwen2MoeForCausalLM"], **SLIDING}, "use_sliding_window is True; only models without it"),
        ({"architectures": ["MiniMaxM2ForCausalLM"], "rotary_dim": 5, "head_dim": 8}, "rotates 5 of 8"),
        ({**MELLUM, "mlp_layer_types": ["sparse"]}, "mlp_layer_types is .* for each of the 2 layers"),
        ({**MELLUM, "mlp_layer_types": ["sparse", "wide"]}, "mlp_layer_types is .*'dense' or 'sparse'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\) is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'.*bfloat16"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "64"}, "hidden_size is '64', it must be an integer"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 kv heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        (
            {"architectures": ["Qwen3ForCausalLM"], **SLIDING, "layer_types": ["full_attention"]},
            "layer_types has 1 entries",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], **SLIDING, "layer_types": ["full_attention", "linear_attention"]},
            "layer_types has 'linear_attention'; the supported ones are full_attention, sliding_attention",
        ),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 8,
            },
            "num_experts_per_tok is 3",
        ),
    ],
)  # fmt: skip
def test_invalid_config_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_hf({**HF, **changes})
    assert "\n" not in str(error.value)


def test_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json, so it is not a model"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    rewrite_config(tmp_path, **HF)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_hf(HF)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 33, "32 attention heads cannot be split over 33 ranks; use T=32 or less"),
        (
            {"intermediate_size": 24}, 36,
            "32 attention heads, 24 intermediate features cannot be split over 36 ranks; use T=24 or less",
        ),
    ],
)  # fmt: skip
def test_tensor_parallel_error_names_the_largest_size(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf({**HF, **changes}).check_tensor_parallel(size)
    assert str(error.value) == message.replace("T=", "tensor_parallel_size=")
