"""Whole experts on each rank: transformers' logits, the tokens of one rank, what each rank loads, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lockstep.runtime.config import Config
from lockstep.runtime.memory.memory_plan import plan_weights
from lockstep.runtime.model.checkpoint import read_model
from lockstep.runtime.model.decoder import Decoder
from lockstep.runtime.model.families import ARCHITECTURES
from lockstep.runtime.model.gpt_oss_moe import ExpertPiece
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.model.weights import Piece, fill_dummy, load_weights

from checkpoints import rewrite_config, tiny_checkpoint
from engines import Results, request, run_engine
from fp8_checkpoints import LAYOUTS, write_fp8
from mxfp4_checkpoints import mxfp4_checkpoint
from ranks import ThreadGroup, run_ranks
from whole_prompt import CPU, prompt_logits

PROMPT = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(3))
FAMILIES = [name for name, family in ARCHITECTURES.items() if family.experts is not None]
CASES = [*FAMILIES, "MXFP4"]
DAILY = [("Glm4MoeForCausalLM", 3), ("MXFP4", 4), ("Ernie4_5_MoeForCausalLM", 2)]


def make(case: str, folder: Path) -> Any:
    return mxfp4_checkpoint(folder) if case == "MXFP4" else tiny_checkpoint(folder, case)


def rank_logits(folder: Path, size: int, option: str = "auto") -> list[torch.Tensor]:
    """The logits that each rank computes with whole experts."""
    return run_ranks(size, lambda comm: prompt_logits(comm, folder, PROMPT, option, expert_parallel=True))


@pytest.mark.parametrize(
    ("case", "size"),
    DAILY + [pytest.param(c, n, marks=pytest.mark.nightly) for c in CASES for n in (1, 2, 3, 4) if (c, n) not in DAILY],
)
def test_logits_match_transformers(tmp_path: Path, case: str, size: int) -> None:
    model = make(case, tmp_path)
    with torch.inference_mode():
        expected = model(PROMPT[None]).logits[0]
    assert expected.abs().max() > 0.5  # else the tolerance would say nothing
    for logits in rank_logits(tmp_path, size):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", [*(pytest.param(x, marks=pytest.mark.nightly) for x in LAYOUTS), "online"])
def test_logits_of_fp8_experts_are_those_of_one_rank(tmp_path: Path, layout: str) -> None:
    """One rank is compared with transformers in test_fp8_models.py. 200 features are no whole blocks of 128."""
    folder, option = tmp_path / "source", "fp8" if layout == "online" else "auto"
    tiny_checkpoint(folder, "Qwen3MoeForCausalLM", hidden_size=160, moe_intermediate_size=200)
    if layout != "online":
        folder = tmp_path / "fp8"
        write_fp8(tmp_path / "source", folder, tmp_path / "plain", LAYOUTS[layout])
    expected = prompt_logits(ThreadGroup(1).rank(0), folder, PROMPT, option)
    for size in (2, 3):
        for logits in rank_logits(folder, size, option):
            torch.testing.assert_close(logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def run(folder: Path, size: int, **options: Any) -> Results:
    """Run mixed requests with a shared prefix, chunks, and too few pages for all."""
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, 131, 21).tolist()
    prompts = [prefix + generator.integers(3, 131, n).tolist() for n in (1, 5, 9)] + [[5], [7] * 40, prefix]
    requests = [request(n, prompt, max_tokens=64) for n, prompt in enumerate(prompts)]
    few = {"num_pages": 80, "max_num_seqs": 5, "max_num_batched_tokens": 7}
    return run_engine(folder, requests, tp=size, **few, **options)


@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.nightly), 3, pytest.param(4, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    "case", ["Qwen2MoeForCausalLM", *(pytest.param(c, marks=pytest.mark.nightly) for c in CASES if "Qwen2Moe" not in c)]
)
def test_tokens_are_those_of_one_rank(tmp_path: Path, case: str, size: int) -> None:
    make(case, tmp_path)
    one, several = run(tmp_path, 1), run(tmp_path, size, enable_expert_parallel=True)
    assert one.preemptions > 0
    assert any(one.cached.values())
    assert several.tokens == one.tokens


def expert_of(piece: Piece) -> str | None:
    """The expert whose matrix or bias a piece is a part of."""
    module, _, rest = piece.name.partition(".experts.")
    if not rest:
        return None
    return f"{module}.{piece.read[0].start if isinstance(piece, ExpertPiece) else rest.partition('.')[0]}"


@pytest.mark.parametrize("case", ["Qwen3MoeForCausalLM", "MXFP4", "GptOssForCausalLM"])
def test_each_expert_is_loaded_whole_by_one_rank(tmp_path: Path, case: str) -> None:
    make(case, tmp_path)
    model = ModelConfig.from_folder(tmp_path).with_expert_parallel(True)
    assert model.experts is not None
    config = Config(model=str(tmp_path), tensor_parallel_size=3).resolved(model, cuda=False)
    owners, counts = [], []
    for rank in range(3):
        decoder = Decoder(model, ThreadGroup(3).rank(rank), dtype=torch.float32, device=CPU, max_positions=8)
        load_weights(decoder.weights, tmp_path)
        fill_dummy(decoder.weights)
        assert all(weight.tensor.float().abs().max() > 0 for weight in decoder.weights)
        assert plan_weights(config, model, rank).weights == sum(weight.tensor.nbytes for weight in decoder.weights)
        mine = {expert for weight in decoder.weights for piece in weight.pieces if (expert := expert_of(piece))}
        counts.append(len(mine) // 2)
        owners += mine
    assert counts == ([2, 2, 2] if model.experts.num_experts == 6 else [2, 1, 1])
    assert len(owners) == len(set(owners)) == 2 * model.experts.num_experts


def test_damaged_expert_is_named_by_the_rank_that_has_it(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "Qwen3MoeForCausalLM")
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[lost]
    tensors["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = ModelConfig.from_folder(tmp_path).with_expert_parallel(True)
    for rank, message in ((0, "1 unexpected: .*experts.4.up_proj"), (1, f"1 missing: {lost}; 1 unexpected")):
        decoder = Decoder(model, ThreadGroup(2).rank(rank), dtype=torch.float32, device=CPU, max_positions=8)
        with pytest.raises(ValueError, match=message):
            load_weights(decoder.weights, tmp_path)


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "Qwen3MoeForCausalLM", num_attention_heads=8)
    config = Config(model=str(tmp_path), enable_expert_parallel=True)
    model = read_model(config, tmp_path)
    assert model.max_tensor_parallel_size == 4
    with pytest.raises(
        ValueError, match=r"^4 experts cannot be split over 5 ranks; use tensor_parallel_size=4 or less$"
    ):
        model.check_tensor_parallel(5)
    rewrite_config(tmp_path, mlp_only_layers=[0, 1])
    with pytest.raises(ValueError, match=r"enable_expert_parallel=True divides .* this Qwen3MoeForCausalLM has none"):
        ModelConfig.from_folder(tmp_path).with_expert_parallel(True)
    with pytest.raises(ValueError, match="this LlamaForCausalLM has none; leave it out"):
        read_model(Config(enable_expert_parallel=True), Path(Config().model))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["Qwen3MoeForCausalLM", "MXFP4"])
def test_bfloat16_on_gpu_is_close_to_transformers(tmp_path: Path, case: str) -> None:
    """Two ranks share the GPU; log-probabilities of the chosen tokens, as in test_gpt_oss.py."""
    sizes = {"head_dim": 64, "hidden_size": 256, "num_experts_per_tok": 4}  # so that bfloat16 changes no choice
    sizes["num_local_experts" if case == "MXFP4" else "num_experts"] = 4
    model = (
        mxfp4_checkpoint(tmp_path, **sizes)
        if case == "MXFP4"
        else tiny_checkpoint(tmp_path, case, **sizes, moe_intermediate_size=64)
    )
    prompts = [list(range(5, 45)), [7] * 30, [3]]
    requests = [request(n, prompt, logprobs=1) for n, prompt in enumerate(prompts)]
    actual = run_engine(tmp_path, requests, tp=2, device="cuda", dtype="bfloat16", enable_expert_parallel=True)
    for n, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + actual.tokens[n]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for row, token, got in zip(logits, actual.tokens[n], actual.logprobs[n], strict=True):
            assert got.token == pytest.approx(float(row[token]), abs=0.3)
