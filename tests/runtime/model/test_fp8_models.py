"""FP8 checkpoints in every layout against transformers with the dequantized weights; what is refused, and how."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from lockstep.comm.base import SingleRank
from lockstep.runtime.config import Config
from lockstep.runtime.memory.memory_plan import plan_weights
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.quantization import Quantization
from lockstep.runtime.model.weights import fill_dummy, load_weights
from lockstep.runtime.request import Request
from lockstep.runtime.sampling_params import SamplingParams

from checkpoints import FAMILIES, tiny_checkpoint
from engines import run_engine
from fp8_checkpoints import LAYOUTS, is_linear, quantized, set_quantization, write_fp8
from ranks import ThreadGroup, run_ranks
from whole_prompt import CPU, prompt_logits

PROMPT = torch.randint(0, 131, (23,), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-4  # float32; the order of sums differs from transformers
# Shards of 1, 2 and 4 ranks begin and end inside blocks: 192 columns of the output projection, 328 features of the MLP.
SIZES: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 328, "head_dim": 48, "moe_intermediate_size": 200}
OWN: dict[str, dict[str, Any]] = {  # hidden_size / num_attention_heads
    name: {"head_dim": 40} for name in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "OlmoeForCausalLM")
}
DAILY = "Phi3ForCausalLM", "Ernie4_5ForCausalLM", "Gemma3ForCausalLM", "Glm4MoeForCausalLM", "Qwen3_5ForCausalLM"
CASES: list[Any] = [(family, layout) for layout in LAYOUTS for family in ("Qwen2ForCausalLM", "Qwen3MoeForCausalLM")]
CASES += [
    pytest.param(family, "fp8 blocks", marks=() if family in DAILY else pytest.mark.nightly)
    for family in FAMILIES
    if family not in ("GptOssForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM")
]
# ERNIE's rows of q and k are reordered, and so are their scales.
CASES += [("Ernie4_5ForCausalLM", layout) for layout in ("compressed-tensors channel", "fp8 tensor")]


def sizes(family: str) -> dict[str, Any]:
    own = {**SIZES, **OWN.get(family, {})}
    return own if "Moe" in family else {name: size for name, size in own.items() if name != "moe_intermediate_size"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a checkpoint in float32 of each family."""
    folders = {family: tmp_path_factory.mktemp("source") for family in FAMILIES}
    for family, folder in folders.items():
        tiny_checkpoint(folder, family, **sizes(family))
    return folders


def transformers_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(PROMPT[None]).logits[0]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, atol=TOLERANCE * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_fp8_checkpoint_equals_transformers_with_dequantized_weights(
    family: str, layout: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    fp8, dequantized = tmp_path / "fp8", tmp_path / "dequantized"
    write_fp8(sources[family], fp8, dequantized, LAYOUTS[layout])
    expected = transformers_logits(dequantized)
    for size in (1, 2, 3, 4):
        for logits in run_ranks(size, lambda comm: prompt_logits(comm, fp8, PROMPT)):
            assert_close(logits, expected)
    assert (expected - transformers_logits(sources[family])).abs().max() > 20 * TOLERANCE  # it was quantized


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Ernie4_5ForCausalLM"])
def test_quantization_while_loading_equals_transformers_with_dequantized_weights(
    family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    write_fp8(sources[family], tmp_path / "fp8", tmp_path / "dequantized", LAYOUTS["fbgemm"])
    expected = transformers_logits(tmp_path / "dequantized")
    for size in (1, 2, 4):
        for logits in run_ranks(size, lambda comm: prompt_logits(comm, sources[family], PROMPT, "fp8")):
            assert_close(logits, expected)


def test_tied_embedding_stays_as_it_is(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "source", "Qwen3ForCausalLM", **sizes("Qwen3ForCausalLM"), tie_word_embeddings=True)
    write_fp8(tmp_path / "source", tmp_path / "fp8", tmp_path / "plain", LAYOUTS["compressed-tensors channel"])
    expected = transformers_logits(tmp_path / "plain")
    for logits in run_ranks(2, lambda comm: prompt_logits(comm, tmp_path / "fp8", PROMPT)):
        assert_close(logits, expected)


def test_fp8_head_of_an_odd_vocabulary(sources: dict[str, Path], tmp_path: Path) -> None:
    fp8, dequantized = tmp_path / "fp8", tmp_path / "dequantized"
    layout = LAYOUTS["compressed-tensors channel"]
    write_fp8(sources["LlamaForCausalLM"], fp8, dequantized, layout._replace(config={**layout.config, "ignore": []}))
    head = load_file(dequantized / "model.safetensors")["lm_head.weight"]
    numbers, scales, meant = quantized(head, "row", layout.stored)
    change(fp8, {"lm_head.weight": numbers, "lm_head.weight_scale": scales})
    change(dequantized, {"lm_head.weight": meant})
    expected = transformers_logits(dequantized)
    for size in (1, 2, 4):
        assert_close(run_ranks(size, lambda comm: prompt_logits(comm, fp8, PROMPT))[0], expected)


def change(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors of the checkpoint; None removes one."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def blocks(sources: dict[str, Path], tmp_path: Path) -> Path:
    write_fp8(sources["LlamaForCausalLM"], tmp_path / "fp8", tmp_path / "dequantized", LAYOUTS["fp8 blocks"])
    return tmp_path / "fp8"


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{UP}.weight_scale_inv": None}, rf"1 missing: {UP}\.weight_scale_inv"),
        ({f"{UP}.weight_scale_inv": torch.ones(2, 2)}, rf"{UP}\.weight_scale_inv \[2, 2\] instead of \[3, 2\]"),
        (
            {f"{UP}.weight": torch.ones(328, 160).to(torch.float8_e5m2)},
            rf"of a dtype other than .*: {UP}\.weight F8_E5M2",
        ),
        ({f"{UP}.weight": torch.full((328, 160), torch.nan).to(torch.float8_e4m3fn)}, rf"NaN or .* in {UP}\.weight"),
        ({f"{UP}.weight": torch.ones(328, 160).bfloat16()}, rf"{UP}\.weight is BF16 instead of F8_E4M3"),
        (
            {"lm_head.weight": torch.ones(131, 160).to(torch.float8_e4m3fn)},
            r"lm_head\.weight is F8_E4M3 instead of F64 or",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_in_one_line(blocks: Path, changes: Any, message: str) -> None:
    change(blocks, changes)
    with pytest.raises(ValueError, match=message) as error:
        prompt_logits(SingleRank(), blocks, PROMPT)
    assert "\n" not in str(error.value)


def test_projections_of_one_matrix_must_have_one_format(blocks: Path) -> None:
    set_quantization(blocks, {**LAYOUTS["fp8 blocks"].config, "modules_to_not_convert": ["lm_head", "q_proj"]})
    with pytest.raises(ValueError, match=r"self_attn\.k_proj in FP8 and .*q_proj not; .* one format"):
        prompt_logits(SingleRank(), blocks, PROMPT)


COMPRESSED = LAYOUTS["compressed-tensors channel"].config


def compressed(**weights: Any) -> dict[str, Any]:
    group = COMPRESSED["config_groups"]["group_0"]
    return {**COMPRESSED, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **weights}}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "mxfp4"}, r"\(mxfp4\) is not supported"),
        ({"quant_method": "awq", "bits": 4}, r"\(awq\) is not supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, r"\(fp8, fmt 'e5m2'\)"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"\(fp8, blocks of 64 x 64\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\(modelopt, quant_algo 'NVFP4'\)"),
        ({**COMPRESSED, "format": "pack-quantized"}, r"\(compressed-tensors, format 'pack-quantized'\)"),
        (compressed(type="int"), "weights of 8-bit int"),
        (compressed(num_bits=4), "weights of 4-bit float"),
        (compressed(strategy="group"), "strategy 'group'"),
        ({**COMPRESSED, "config_groups": {}}, "0 config_groups"),
        ({}, r"\(unknown\) is not supported"),
    ],
)
def test_other_formats_are_refused_by_name(blocks: Path, config: dict[str, Any], message: str) -> None:
    set_quantization(blocks, config)
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_folder(blocks)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ignored", "targets", "covered"),
    [
        ((), ("Linear",), True),
        (("lm_head",), ("Linear",), True),
        (("model.layers.1",), ("Linear",), True),
        (("model.layers.11.mlp.up_proj",), ("Linear",), False),
        (("up_proj",), ("Linear",), False),
        (("mlp.up",), ("Linear",), True),
        (("re:.*layers.11.*",), ("Linear",), False),
        (("*.mlp.up_proj",), ("Linear",), False),
        ((), ("re:.*self_attn.*",), False),
        ((), ("re:.*mlp.*",), True),
    ],
)
def test_lists_of_modules(ignored: tuple[str, ...], targets: tuple[str, ...], covered: bool) -> None:
    quantization = Quantization(method="", granularity="row", ignored=ignored, targets=targets)
    assert quantization.covers("model.layers.11.mlp.up_proj") == covered


@pytest.mark.parametrize(
    "family", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Phi3ForCausalLM", "Ernie4_5ForCausalLM"]
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "online"])
def test_dummy_weights_and_memory_plan_of_every_layout(
    layout: str, family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(sources[family] / "config.json", tmp_path)
    if layout != "online":
        name = "hf_quant_config.json" if LAYOUTS[layout].modelopt_file else "config.json"
        fields = json.loads((tmp_path / "config.json").read_text())
        own = LAYOUTS[layout].config
        (tmp_path / name).write_text(
            json.dumps(own if name != "config.json" else {**fields, "quantization_config": own})
        )
    for size in (1, 4):
        config = Config(
            model=str(tmp_path), tensor_parallel_size=size, quantization="fp8" if layout == "online" else "auto"
        )
        model = ModelConfig.from_folder(tmp_path).quantized_by(config.quantization)
        decoder = Decoder(model, ThreadGroup(size).rank(0), dtype=torch.float32, device=CPU, max_positions=8)
        fill_dummy(decoder.weights)
        assert all(weight.tensor.float().abs().max() > 0 for weight in decoder.weights)
        plan = plan_weights(config.resolved(model, cuda=False), model)
        assert plan.weights == sum(weight.tensor.nbytes for weight in decoder.weights)


def test_quantization_while_loading_keeps_one_format(blocks: Path) -> None:
    model = ModelConfig.from_folder(blocks)
    assert model.quantized_by("fp8") is model
    decoder = Decoder(model, SingleRank(), dtype=torch.float32, device=CPU, max_positions=8)
    load_weights(decoder.weights, blocks)
    stored = load_file(blocks / "model.safetensors")
    total = sum(tensor.numel() for name, tensor in stored.items() if is_linear(name))
    assert total == sum(w.tensor.numel() for w in decoder.weights if w.tensor.dtype == torch.float8_e4m3fn)


def test_fp8_kv_cache_equals_transformers_with_rounded_keys_and_values(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sources["LlamaForCausalLM"]
    rotate = modeling_llama.apply_rotary_pos_emb

    def rounded(x: Tensor) -> Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def rotate_and_round(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(*arguments, **options)
        return q, rounded(k)

    exact = transformers_logits(folder)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_round)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, inputs, output: rounded(output))
    with torch.inference_mode():
        expected = model(PROMPT[None]).logits[0]
    for size in (1, 2):
        for logits in run_ranks(size, lambda comm: prompt_logits(comm, folder, PROMPT, kv_dtype=torch.float8_e4m3fn)):
            assert_close(logits, expected)
    assert (expected - exact).abs().max() > 20 * TOLERANCE


def test_fp8_kv_cache_has_four_times_the_tokens_of_float32(sources: dict[str, Path]) -> None:
    plans = []
    for choice in ("auto", "fp8"):
        config = Config(model=str(sources["LlamaForCausalLM"]), kv_cache_dtype=choice, kv_cache_memory=0.01)
        model = ModelConfig.from_folder(config.model)
        resolved = config.resolved(model, cuda=False)
        plans.append(plan_weights(resolved, model).with_pages(resolved))
        decoder = Decoder(model, SingleRank(), dtype=torch.float32, device=CPU, max_positions=8)
        shape = decoder.attention_shape(config.page_size, torch.float32, resolved.kv_torch_dtype)
        assert plans[-1].page_bytes == shape.page_bytes
    assert plans[1].num_pages // plans[0].num_pages == 4


@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_tokens_equal_those_of_transformers_with_the_dequantized_weights(blocks: Path, tp: int) -> None:
    prompt = PROMPT.tolist()
    model = AutoModelForCausalLM.from_pretrained(blocks.parent / "dequantized", dtype=torch.float32).eval()
    expected = model.generate(PROMPT[None], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(prompt) :]
    params = SamplingParams(temperature=0.0, max_tokens=12, seed=0)
    request = Request(0, np.array(prompt, np.int32), len(prompt), params, [])
    results = run_engine(blocks, [request], tp=tp)
    assert results.tokens[0] == expected.tolist()


# The factors that the names mean, rounded up to powers of two.
K_SCALES, V_SCALES = {0: (0.011, 2.0**-6), 1: (2.0**-9, 2.0**-9)}, {0: (0.003, 2.0**-8), 1: (0.0009, 2.0**-10)}


def add_kv_scales(source: Path, folder: Path, module: str) -> None:
    """Copy a checkpoint, with scales of the KV cache; `module` is that of keys or values, below self_attn."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for which, scales in (("k", K_SCALES), ("v", V_SCALES)):
        for layer, (scale, _) in scales.items():
            name = f"model.layers.{layer}.self_attn.{module.format(which)}{which}_scale"
            tensors[name] = torch.tensor(scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("layout", [None, "fp8 blocks", "modelopt tensor"])
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_scales_of_the_kv_cache_equal_transformers_with_scaled_keys_and_values(
    family: str, layout: str | None, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8 = exact = sources[family]
    if layout is not None:
        fp8, exact = tmp_path / "fp8", tmp_path / "dequantized"
        plain = LAYOUTS[layout]._replace(extra=())
        write_fp8(sources[family], fp8, exact, plain)
    add_kv_scales(fp8, tmp_path / "scaled", "{}_proj." if layout == "modelopt tensor" else "")
    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32, attn_implementation="eager").eval()
    module = importlib.import_module(type(model).__module__)
    rotate, layers = module.apply_rotary_pos_emb, iter(K_SCALES)

    def rounded(x: Tensor, scale: float) -> Tensor:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def rotate_and_round(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(*arguments, **options)
        return q, rounded(k, K_SCALES[next(layers)][1])

    monkeypatch.setattr(module, "apply_rotary_pos_emb", rotate_and_round)
    for n, layer in enumerate(model.model.layers):
        scale = V_SCALES[n][1]
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, output, scale=scale: rounded(output, scale))
    with torch.inference_mode():
        expected = model(PROMPT[None]).logits[0]
    folder = tmp_path / "scaled"
    for size in (1, 2):
        for logits in run_ranks(size, lambda comm: prompt_logits(comm, folder, PROMPT, kv_dtype=torch.float8_e4m3fn)):
            assert_close(logits, expected)


def test_scale_of_the_kv_cache_that_is_no_number_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    add_kv_scales(sources["LlamaForCausalLM"], tmp_path / "scaled", "")
    tensors = load_file(tmp_path / "scaled/model.safetensors")
    tensors["model.layers.1.self_attn.k_scale"] = torch.tensor([0.5, 0.5])
    save_file(tensors, tmp_path / "scaled/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.k_scale must be one positive number, not \["):
        prompt_logits(SingleRank(), tmp_path / "scaled", PROMPT, kv_dtype=torch.float8_e4m3fn)
