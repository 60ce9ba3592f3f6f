"""Groups of layers with a page table each, of published models and of any; engines whose layers have windows or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.engine import Engine
from lockstep.runtime.memory.memory_plan import plan_weights
from lockstep.runtime.model.attention.backend import AttentionBackend, BatchInvariantAttention
from lockstep.runtime.model.kv_pool import AttentionShape
from lockstep.runtime.model.layer_groups import MAX_WINDOW_GROUPS, LayerGroups
from lockstep.runtime.model.model_config import ModelConfig

from checkpoints import tiny_checkpoint
from engines import request, run_engine
from flashinfer_stand_in import flashinfer_stand_in
from replayed_graphs import ReplayedGraph, use_replayed_graphs


@pytest.mark.parametrize(
    ("windows", "num_window_groups", "layers_per_page"),
    [
        ([128, None] * 12, 1, 12),  # gpt-oss-20b
        ([4096, None] * 21, 1, 21),  # Gemma 2 9B
        (([512] * 5 + [None]) * 4 + [512] * 2, 6, 4),  # Gemma 3 1B
        (([1024] * 5 + [None]) * 8, 5, 8),  # Gemma 3 12B
        (([1024] * 5 + [None]) * 10 + [1024] * 2, 5, 11),  # Gemma 3 27B
        ([4096, 4096, 4096, None] * 8, 3, 8),  # OLMo 3 7B
        ([None] * 28, 0, 28),
        ([4096] * 28, 0, 28),
        ([None, None, 8], 0, 3),  # more layers see all keys: groups would cost memory in short contexts
        ([None] + [8] * 27, 7, 4),
    ],
)
def test_groups_of_layers(windows: list[int | None], num_window_groups: int, layers_per_page: int) -> None:
    groups = LayerGroups.of_windows(windows)
    assert (groups.num_window_groups, groups.layers_per_page) == (num_window_groups, layers_per_page)
    if num_window_groups:
        assert groups.window == max(window for window in windows if window is not None)


@given(st.lists(st.sampled_from([None, 3, 5]), min_size=1, max_size=80))
def test_each_layer_has_a_place_of_its_own(windows: list[int | None]) -> None:
    groups = LayerGroups.of_windows(windows)
    places = list(zip(groups.groups, groups.places, strict=True))
    assert len(set(places)) == len(windows)
    assert groups.num_window_groups <= MAX_WINDOW_GROUPS
    if groups.num_window_groups:
        assert [group == 0 for group in groups.groups] == [window is None for window in windows]
        assert set(groups.groups) == set(range(1 + groups.num_window_groups))
        # A long context needs less memory than with one group, and a short one at most twice as much.
        assert groups.layers_per_page < len(windows) <= (1 + groups.num_window_groups) * groups.layers_per_page
        assert (1 + groups.num_window_groups) * groups.layers_per_page <= 2 * len(windows)


LAYERS = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": LAYERS,
    "GptOssForCausalLM": {"num_hidden_layers": 4},
    "Gemma2ForCausalLM": {},
    "Olmo3ForCausalLM": LAYERS,
    "MellumForCausalLM": LAYERS,
    "Exaone4ForCausalLM": LAYERS,
}


@pytest.mark.parametrize("chunk", [7, pytest.param(5, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("size", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 3, 4))])
@pytest.mark.parametrize(
    "family", ["Gemma3ForCausalLM", *(pytest.param(f, marks=pytest.mark.nightly) for f in list(FAMILIES)[1:])]
)
def test_tokens_equal_those_of_transformers(tmp_path: Path, family: str, size: int, chunk: int) -> None:
    """Shared prefixes, chunks, preemptions, and and pages that are given up."""
    model = tiny_checkpoint(tmp_path, family, max_position_embeddings=160, **FAMILIES[family])
    generator = np.random.default_rng(0)
    prefix = generator.integers(3, 131, 41).tolist()
    prompts = [prefix + generator.integers(3, 131, n).tolist() for n in (1, 5, 19)] + [[5], [7] * 60, prefix, prefix]
    requests = [request(n, prompt, max_tokens=64) for n, prompt in enumerate(prompts)]
    held: list[int] = []

    def note_held(step: int, engine: Engine) -> None:
        slots = engine.scheduler.slots
        held.extend((slots.num_pages - slots.num_unseen_pages)[slots.running].tolist())

    options: dict[str, Any] = {"page_size": 2, "max_num_seqs": 5, "max_num_batched_tokens": chunk}
    num_pages = 120 if FAMILIES[family] == LAYERS else 90
    results = run_engine(tmp_path, requests, tp=size, num_pages=num_pages, between=note_held, **options)
    assert results.preemptions > 0
    assert results.cached[6] > 0
    assert max(held) <= (8 + chunk) // 2 + 2  # the window, and the tokens of a step
    for n, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + results.tokens[n]])).logits[0, len(prompt) - 1 : -1]
        assert results.tokens[n] == logits.argmax(-1).tolist()


def test_memory_plan_of_a_context(tmp_path: Path) -> None:
    """4 layers of 6 have a window of 8; with 64 tokens a step they need 37 pages of 2 tokens at most, not 500."""
    tiny_checkpoint(tmp_path, "Gemma3ForCausalLM", max_position_embeddings=1000, **LAYERS)
    model = ModelConfig.from_folder(tmp_path)
    requested = Config(model=str(tmp_path), page_size=2, max_num_seqs=8, max_num_batched_tokens=64)
    plan = plan_weights(requested.resolved(model, cuda=False), model).with_pages(requested.resolved(model, cuda=False))
    assert plan.page_bytes == 2 * 2 * 2 * 16 * 4 * 2  # K and V, layers, KV heads, their size, float32, tokens
    assert plan.pages_at_once(1000) == 500 + 2 * 37
    assert plan.num_pages == 8 * 574
    assert plan.longest_context(1000) == 1000


@contextmanager
def backend_of_gpus(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let engines on a CPU use a backend of GPUs: by FlashInfer's stand-in, or by the definitions of our ops."""

    def select(config: Config, model: ModelConfig, shape: AttentionShape, *_: Any, **__: Any) -> AttentionBackend:
        from lockstep.runtime.model.attention.flashinfer_backend import FlashInferAttention

        scale, softcap, groups = model.attention_multiplier, model.attention_softcap, model.layer_groups.groups
        if kind == "flashinfer":
            return FlashInferAttention(
                shape, scale, dict.fromkeys(zip(model.windows, groups, strict=True)), torch.device("cpu"), softcap
            )
        return BatchInvariantAttention(shape, scale, set(model.windows), 160, softcap)

    with flashinfer_stand_in():
        if kind == "graphs":
            use_replayed_graphs(monkeypatch)
        monkeypatch.setattr(startup, "select_backend", select)
        yield


@pytest.mark.parametrize("family", ["GptOssForCausalLM", pytest.param("Gemma3ForCausalLM", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", ["flashinfer", "graphs"])
def test_backends_of_gpus_use_the_pages_of_each_group(
    tmp_path: Path, family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path, family, max_position_embeddings=160, head_dim=64, **FAMILIES[family])
    generator = np.random.default_rng(1)
    prefix = generator.integers(3, 131, 20).tolist()
    prompts = [prefix + generator.integers(3, 131, n).tolist() for n in (1, 5, 19)] + [[5], [7] * 30, prefix]
    requests = [request(n, prompt, max_tokens=24) for n, prompt in enumerate(prompts)]
    few: dict[str, Any] = {"page_size": 4, "max_num_seqs": 5, "max_num_batched_tokens": 20}
    few["num_pages"] = 70 if FAMILIES[family] == LAYERS else 50
    expected = run_engine(tmp_path, requests, **few)
    with backend_of_gpus(kind, monkeypatch):
        actual = run_engine(tmp_path, requests, **few)
    assert actual.tokens == expected.tokens
    assert actual.preemptions == expected.preemptions > 0
    assert ReplayedGraph.num_replays > 0 or kind != "graphs"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"deterministic": True}], ids=str)
def test_bfloat16_on_gpu_is_close_to_transformers(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """Log-probabilities of the chosen tokens, far beyond the window, with preemptions and pages that are given up."""
    sizes: dict[str, Any] = {"head_dim": 64, "hidden_size": 256, "max_position_embeddings": 160, "sliding_window": 20}
    sizes["initializer_range"] = 0.07  # larger logits round coarsely
    all_experts = {"GptOssForCausalLM": 6, "MellumForCausalLM": 4}  # bfloat16 would choose others
    chosen = {"num_experts_per_tok": all_experts[family]} if family in all_experts else {}
    model = tiny_checkpoint(tmp_path, family, **{**FAMILIES[family], **sizes, **chosen})
    prompts = [list(range(5, 25 + n)) for n in range(6)]
    requests = [request(n, prompt, logprobs=1, max_tokens=80) for n, prompt in enumerate(prompts)]
    few = {"page_size": 4, "num_pages": 90, "max_num_seqs": 5, "max_num_batched_tokens": 30}
    actual = run_engine(tmp_path, requests, device="cuda", dtype="bfloat16", **few, **options)
    assert actual.preemptions > 0
    for n, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + actual.tokens[n]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for row, token, got in zip(logits, actual.tokens[n], actual.logprobs[n], strict=True):
            assert got.token == pytest.approx(float(row[token]), abs=0.3)
