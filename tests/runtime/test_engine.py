"""The whole engine against transformers, and against itself with other batches, chunks, ranks and layouts.

float32 on a CPU, token for token. The checkpoints are random with a wide initialization: with transformers' default
they repeat one token, and a broken cache would pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import PreTrainedModel

from lockstep.runtime.engine import Engine
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.request import Request

from checkpoints import FAMILIES, tiny_checkpoint, tiny_model
from engines import Results, request, run_engine

LENGTHS = (1, 3, 4, 5, 15, 16, 17, 31, 40, 64, 7, 22)


def prompts() -> list[list[int]]:
    """16 prompts of mixed lengths, some equal, some with a common beginning."""
    rng = np.random.default_rng(7)
    actual = [rng.integers(3, 131, n).tolist() for n in LENGTHS]
    return [*actual, actual[9], actual[9][:33] + actual[0], actual[8][:16] + actual[7], actual[5]]


def greedy(model: PreTrainedModel, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@functools.cache
def tokens_of_transformers(architecture: str) -> list[list[int]]:
    """Return the tokens that transformers generates for each prompt."""
    model = tiny_model(architecture)
    return [greedy(model, prompt, 64) for prompt in prompts()]


SPLIT = "Qwen3ForCausalLM"  # the family that is split over ranks daily: fewer KV heads than ranks, and QK-norm
# The others differ from these by rows of families.py, whose logits test_models.py compares daily.
DAILY = (
    SPLIT, "LlamaForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM", "GptOssForCausalLM",
    "Glm4MoeForCausalLM", "Qwen3_5MoeForCausalLM",
)  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "tp"),
    [
        pytest.param(family, tp, marks=() if family == SPLIT or (tp == 1 and family in DAILY) else pytest.mark.nightly)
        for family in FAMILIES
        for tp in (1, 2, 3, 4)
        if family != SPLIT or tp != 3
    ],
)
def test_tokens_match_transformers(tmp_path: Path, architecture: str, tp: int) -> None:
    tiny_checkpoint(tmp_path, architecture)
    actual = run_engine(tmp_path, [request(i, p, max_tokens=64) for i, p in enumerate(prompts())], tp=tp)
    expected = tokens_of_transformers(architecture)
    for i, prompt in enumerate(prompts()):
        assert actual.tokens[i] == expected[i], f"prompt {i} of {len(prompt)} tokens"
    assert max(len(set(tokens)) for tokens in expected) > 8, (
        "the checkpoint repeats itself and would hide a broken cache"
    )


HARD: dict[str, dict[str, Any]] = {
    "chunks of 7 tokens, few pages": {"max_num_batched_tokens": 7, "max_num_seqs": 6, "num_pages": 40},
    "chunks, few pages, three ranks": {"max_num_batched_tokens": 7, "max_num_seqs": 6, "num_pages": 40, "tp": 3},
    "one token at a time": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
}


@pytest.mark.nightly
@pytest.mark.parametrize("options", list(HARD.values()), ids=list(HARD))
@pytest.mark.parametrize("architecture", FAMILIES)
def test_tokens_of_every_family_match_with_chunks_and_preemptions(
    tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    tiny_checkpoint(tmp_path, architecture)
    requests = [request(i, prompt, max_tokens=64) for i, prompt in enumerate(prompts())]
    actual = run_engine(tmp_path, requests, max_model_len=128, **options)
    assert actual.tokens == dict(enumerate(tokens_of_transformers(architecture)))
    assert ("num_pages" in options) == (actual.preemptions > 0)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(f, marks=() if f == "GptOssForCausalLM" else pytest.mark.nightly) for f in FAMILIES],
)
def test_tokens_continue_after_a_recovery(tmp_path: Path, architecture: str) -> None:
    """A new engine gets the prompts and the tokens so far, as after a crash of the ranks."""
    tiny_checkpoint(tmp_path, architecture)
    requests = [request(i, prompt, max_tokens=64) for i, prompt in enumerate(prompts())]
    before: dict[int, list[int]] = {}

    def crash(step: int, engine: Engine) -> None:
        if step == 30:
            slots = engine.scheduler.slots
            for slot in slots.running.tolist():
                tokens = slots.tokens[slot, : slots.num_known[slot]].tolist()
                before[int(slots.uid[slot])] = tokens
            engine.cancel([r.uid for r in requests])

    options: dict[str, Any] = {"max_num_seqs": 6, "max_num_batched_tokens": 30, "num_pages": 60, "max_model_len": 128}
    first = run_engine(tmp_path, requests, between=crash, **options)
    again = [replace(r, tokens=np.array(before.get(r.uid, r.tokens), np.int32)) for r in requests]
    again = [r for r in again if first.finished[r.uid].reason == "abort"]
    actual = run_engine(tmp_path, again, **options)
    expected = tokens_of_transformers(architecture)
    for r in again:
        assert expected[r.uid] == r.tokens[r.num_prompt_tokens :].tolist() + actual.tokens[r.uid]
    assert sum(len(r.tokens) > r.num_prompt_tokens for r in again) >= 3


def mixed() -> list[Request]:
    """The prompts with all kinds of sampling."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 1.0, "logit_bias": {5: 4.0, 9: -50.0}, "min_tokens": 4},
    ]
    return [request(i, p, stop_ids=[2], max_tokens=24, **kinds[i % len(kinds)]) for i, p in enumerate(prompts())]


@pytest.fixture(scope="module")
def baseline(llama_folder: Path) -> Results:
    return run_engine(llama_folder, mixed())


ARRANGEMENTS = {
    "chunks of 7 tokens": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "one token at a time": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "no prefix cache": {"enable_prefix_caching": False},
    "page-first": {"kv_layout": "page-first"},
    "page size 1": {"page_size": 1},
    "page size 16": {"page_size": 16},
    "page size 5": {"page_size": 5},
    "four at a time": {"max_num_seqs": 4},
    "results one step late": {"overlap": True},
    "results one step late, few pages": {"overlap": True, "num_pages": 32, "tp": 2},
    "two ranks": {"tp": 2},
    "four ranks": {"tp": 4},
    "pages for the longest request only": {"num_pages": 32},
    "two ranks, few pages, chunks": {"tp": 2, "num_pages": 40, "max_num_batched_tokens": 32},
    "no prefix cache, few pages": {"num_pages": 32, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("options", list(ARRANGEMENTS.values()), ids=list(ARRANGEMENTS))
def test_tokens_are_independent_of_batching(llama_folder: Path, baseline: Results, options: dict[str, object]) -> None:
    if "num_pages" in options:
        options = {"max_model_len": 32 * 4, **options}
    actual = run_engine(llama_folder, mixed(), **options)  # type: ignore[arg-type]
    assert actual.tokens == baseline.tokens
    assert actual.finished == baseline.finished
    if "num_pages" in options:
        assert actual.preemptions > 0, "meant to run out of pages"


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"tp": 2, "overlap": True}, marks=pytest.mark.nightly),
        {"enable_prefix_caching": False},
        {"page_size": 1, "num_pages": 28},
    ],
    ids=["few pages", "two ranks, results one step late", "no prefix cache", "page size 1"],
)
def test_requests_with_a_window_are_longer_than_the_cache(tmp_path: Path, options: dict[str, object]) -> None:
    tiny_checkpoint(tmp_path, "MistralForCausalLM", sliding_window=8)
    expected = run_engine(tmp_path, mixed())
    few: dict[str, object] = {"num_pages": 8, "max_model_len": 128, "max_num_batched_tokens": 12, "max_num_seqs": 8}
    actual = run_engine(tmp_path, mixed(), **(few | options))  # type: ignore[arg-type]
    assert actual.tokens == expected.tokens
    assert actual.finished == expected.finished
    assert actual.preemptions > 0
    assert max(len(r.tokens) + len(actual.tokens[r.uid]) for r in mixed()) > 2 * 8 * 4


def test_tokens_of_a_request_alone_are_the_same(llama_folder: Path, baseline: Results) -> None:
    for r in mixed():
        assert run_engine(llama_folder, [r]).tokens[r.uid] == baseline.tokens[r.uid]


def test_tokens_are_the_same_when_requests_come_and_go(llama_folder: Path, baseline: Results) -> None:
    """Requests arrive one per step, between others that are cancelled in every phase."""
    arriving, noise = mixed(), [request(100 + i, p, max_tokens=50) for i, p in enumerate(prompts())]

    def between(step: int, engine: Engine) -> None:
        if step <= len(arriving) - 1:
            engine.add([arriving[step], noise[step]])
            engine.cancel([100 + step - 3])
            if step % 5 == 0:
                engine.cancel([100 + step])

    actual = run_engine(
        llama_folder, arriving[:1], between=between, num_pages=64, max_num_batched_tokens=48, max_model_len=128
    )
    assert {uid: actual.tokens[uid] for uid in baseline.tokens} == baseline.tokens
    cancelled = [f for uid, f in actual.finished.items() if uid >= 100 and f.reason == "abort"]
    assert len(cancelled) >= 10


def test_attention_of_a_cpu_is_a_part_of_a_step(llama_folder: Path) -> None:
    engines: list[Engine] = []
    run_engine(llama_folder, mixed(), between=lambda step, engine: engines.append(engine))
    assert 0 < engines[-1].stats.attention_s < engines[-1].stats.launch_s
    assert engines[-1].stats.collective_s == 0


def test_prefix_is_computed_once_within_one_step(llama_folder: Path) -> None:
    prompt = prompts()[9]  # 64 tokens, pages of 4
    actual = run_engine(llama_folder, [request(i, prompt) for i in range(4)])
    assert actual.cached == {0: 0, 1: 60, 2: 60, 3: 60}
    assert len({tuple(t) for t in actual.tokens.values()}) == 1


def test_finished_output_is_a_cached_prefix(llama_folder: Path) -> None:
    prompt = prompts()[8]
    first = run_engine(llama_folder, [request(0, prompt)]).tokens[0]
    longer = prompt + first + [7, 8, 9]
    alone = run_engine(llama_folder, [request(1, longer)])

    def between(step: int, engine: Engine) -> None:
        if step == 40:
            engine.add([request(1, longer)])

    again = run_engine(llama_folder, [request(0, prompt), request(2, [5] * 30, max_tokens=60)], between=between)
    assert again.tokens[1] == alone.tokens[1]
    assert again.cached[1] == (len(prompt) + len(first) - 1) // 4 * 4


def test_stop_ids_and_min_tokens(llama_folder: Path) -> None:
    prompt = prompts()[4]
    free = run_engine(llama_folder, [request(0, prompt)]).tokens[0]
    stop = free[5]
    first = free.index(stop)
    ended = run_engine(llama_folder, [request(0, prompt, stop_ids=[stop])])
    assert ended.tokens[0] == free[: first + 1]
    assert (ended.finished[0].reason, ended.finished[0].stop_id) == ("stop", stop)
    later = run_engine(llama_folder, [request(0, prompt, stop_ids=[stop], min_tokens=first + 3)])
    assert stop not in later.tokens[0][: first + 3]
    assert len(later.tokens[0]) > first + 3


def test_logprobs_match_transformers(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, "Qwen3ForCausalLM")
    prompt = prompts()[6]
    actual = run_engine(tmp_path, [request(0, prompt, logprobs=3, temperature=1.0, presence_penalty=1.0)], tp=2)
    tokens = actual.tokens[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for i, (token, got) in enumerate(zip(tokens, actual.logprobs[0], strict=True)):
        assert got.token == pytest.approx(float(expected[i, token]), abs=1e-4)
        assert got.rank == int((expected[i] > expected[i, token]).sum()) + 1
        top = expected[i].topk(3)
        assert got.top_ids == top.indices.tolist()
        assert got.top == pytest.approx(top.values.tolist(), abs=1e-4)


def test_request_that_cannot_run_ends_alone(llama_folder: Path) -> None:
    bad = [request(1, []), request(2, [131]), request(3, [-1]), request(4, [3] * 300)]
    actual = run_engine(llama_folder, [request(0, prompts()[0]), *bad, request(5, prompts()[1])])
    assert actual.finished[0].reason == actual.finished[5].reason == "length"
    errors = {uid: actual.finished[uid].error for uid in (1, 2, 3, 4)}
    assert all(actual.finished[uid].reason == "abort" for uid in errors)
    assert "empty" in str(errors[1])
    assert "131" in str(errors[2])
    assert "0 to 130" in str(errors[2])
    assert "-1" in str(errors[3])
    assert "300 tokens" in str(errors[4])


def test_output_ends_at_the_context_length(llama_folder: Path) -> None:
    actual = run_engine(llama_folder, [request(0, [5] * 250, max_tokens=100)])
    assert len(actual.tokens[0]) == 6
    assert actual.finished[0].reason == "length"


@pytest.mark.gpu
@pytest.mark.parametrize("tp", [1, 2])
def test_tokens_on_gpu_match_cpu(llama_folder: Path, baseline: Results, tp: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    actual = run_engine(llama_folder, mixed(), device="cuda", dtype="float32", tp=tp)
    assert actual.tokens == baseline.tokens


ON_GPU = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "without overlap": {"overlap_scheduling": False},
    "torch attention": {"attention_backend": "torch"},
    "page-first, page size 16": {"kv_layout": "page-first", "page_size": 16},
    "chunks": {"max_num_batched_tokens": 32},
}


def router_margins(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return a list to which each router of a running `model` adds the margins of each token, [T].

    A margin is the logit of the last selected expert less that of the next one. A sigmoid, or a softmax with a bias
    after it, changes by a fourth of a logit at most. So do the sums of groups.
    """
    margins: list[torch.Tensor] = []
    chosen = getattr(model.config, "num_experts_per_tok", 0)
    groups, searched = getattr(model.config, "n_group", 1), getattr(model.config, "topk_group", 1)
    is_sigmoid = model.config.model_type in ("glm4_moe", "minimax_m2")
    biases = {name.partition(".e_score")[0]: bias for name, bias in tensors_of(model) if "e_score" in name}

    def look(router: torch.nn.Module, inputs: tuple[torch.Tensor], _: object, *, name: str) -> None:
        logits = inputs[0].flatten(0, -2) @ router.weight.t() + getattr(router, "bias", 0)
        places = name, f"{name}.moe_statics", name.removesuffix(".gate")
        bias = next((biases[place] for place in places if place in biases), None)
        if bias is not None:
            logits = 4 * ((logits.sigmoid() if is_sigmoid else logits.softmax(-1)) + bias.flatten())
        margin = logits.new_full(logits.shape[:1], torch.inf)
        if groups > searched:
            split = logits.unflatten(-1, (groups, -1))
            sums = split.topk(2, dim=-1).values.sum(-1)
            best = sums.topk(searched + 1, dim=-1)
            margin = (best.values[:, -2] - best.values[:, -1]) / 2
            kept = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best.indices[:, :-1], True)
            logits = split.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        best_logits = logits.topk(chosen + 1, dim=-1).values
        margins.append(torch.minimum(margin, best_logits[:, -2] - best_logits[:, -1]))

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(functools.partial(look, name=name))
    return margins


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@pytest.mark.gpu
@pytest.mark.parametrize("options", list(ON_GPU.values()), ids=list(ON_GPU))
@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_bfloat16_on_gpu_is_close_to_transformers(
    tmp_path: Path, architecture: str, options: dict[str, object]
) -> None:
    """Tokens may differ where two are nearly equal: compare the log-probabilities of those that were chosen.

    So may experts, and a token with another expert is another token: leave out where two are nearly equal. Such a token
    also changes what later ones attend to: of models with experts 1 % may differ.
    """
    sizes = {"head_dim": 64, "hidden_size": 256, "sliding_window": 20}
    # Larger logits round coarsely. So does the delta rule: its norm scales a result up, however small it is.
    deviation, dtype = (0.03, "float16") if architecture.startswith("Qwen3_5") else (0.1, "bfloat16")
    model = tiny_checkpoint(tmp_path, architecture, **sizes, initializer_range=deviation)
    margins = router_margins(model)
    requests = [request(i, p, logprobs=1, temperature=i % 2) for i, p in enumerate(prompts())]
    actual = run_engine(tmp_path, requests, device="cuda", dtype=dtype, **options)  # type: ignore[arg-type]
    compared, different = 0, []
    for i, prompt in enumerate(prompts()):
        part = slice(len(prompt) - 1, -1)
        margins.clear()
        with torch.inference_mode():
            expected = model(torch.tensor([prompt + actual.tokens[i]])).logits[0, part].log_softmax(-1)
        unsure = (
            torch.stack(margins)[:, part].amin(0) < 0.05 if margins else torch.zeros(len(expected), dtype=torch.bool)
        )
        compared += int((~unsure).sum())
        for n, (token, got) in enumerate(zip(actual.tokens[i], actual.logprobs[i], strict=True)):
            if not unsure[n] and abs(got.token - float(expected[n, token])) > 0.3:
                different.append((i, n, got.token, float(expected[n, token])))
    assert len(different) <= (compared // 100 if margins else 0), different
    assert compared > 0.8 * sum(map(len, actual.tokens.values()))


@pytest.mark.gpu
def test_keys_are_stored_before_another_request_reads_them(tmp_path: Path) -> None:
    """Each prompt is the one before and a token: all come in one step, where each reads what those before it store."""
    model = tiny_checkpoint(tmp_path, "LlamaForCausalLM", head_dim=64, hidden_size=256)
    longest = prompts()[9][:24]
    requests = [request(n, longest[:n], logprobs=1, max_tokens=1) for n in range(4, len(longest))]
    actual = run_engine(tmp_path, requests, device="cuda", dtype="bfloat16", page_size=1)
    assert list(actual.cached.values()) == [0, *range(4, len(longest) - 1)]
    with torch.inference_mode():
        expected = model(torch.tensor([longest])).logits[0].log_softmax(-1)
    for n, (got,) in actual.logprobs.items():
        assert got.token == pytest.approx(float(expected[n - 1, actual.tokens[n][0]]), abs=0.3), f"prompt of {n} tokens"


DRAWS = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01}]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("architecture", "rows", "logprobs"),
    [("LlamaForCausalLM", rows, logprobs) for rows in (1, 2, 8, 24) for logprobs in (3, None)]
    + [(name, *how) for name in FAMILIES if name != "LlamaForCausalLM" for how in ((2, 3), (24, None))],
)  # log-probabilities are computed outside of the graph
def test_graphs_are_bitwise_equal_to_eager(tmp_path: Path, architecture: str, rows: int, logprobs: int | None) -> None:
    tiny_checkpoint(tmp_path, architecture, head_dim=64, hidden_size=256, sliding_window=20)
    actual = []
    for enforce_eager in (False, True):
        # As many requests as a graph has rows, and prompts of as many tokens as a piecewise graph: nothing is padded.
        kinds = [DRAWS[(i + rows) % len(DRAWS)] for i in range(rows)]
        requests = [
            request(i, [7 * i + j for j in range(8)], logprobs=logprobs, **kind) for i, kind in enumerate(kinds)
        ]
        options = {"device": "cuda", "dtype": "bfloat16", "enforce_eager": enforce_eager}
        actual.append(run_engine(tmp_path, requests, **options))  # type: ignore[arg-type]
    graphs, eager = actual
    assert graphs.tokens == eager.tokens
    assert graphs.logprobs == eager.logprobs


REARRANGED = ("chunks of 7 tokens", "page size 5", "no prefix cache, few pages")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_deterministic_bfloat16_is_batch_invariant(tmp_path: Path, architecture: str) -> None:
    tiny_checkpoint(tmp_path, architecture, head_dim=64, hidden_size=256, sliding_window=20)
    config = ModelConfig.from_folder(tmp_path)
    options = {"device": "cuda", "dtype": "bfloat16", "deterministic": True}
    requests = [replace(r, params=replace(r.params, logprobs=2)) for r in mixed()]

    def run(requests: list[Request], **more: object) -> Results:
        return run_engine(tmp_path, requests, **options, **more)  # type: ignore[arg-type]

    together = run(requests)
    every = architecture == "LlamaForCausalLM"  # the others take the same way through the engine
    for name, more in ARRANGEMENTS.items():
        if "tp" in more or "overlap" in more or not (every or name in REARRANGED):
            continue
        if "num_pages" in more:
            more = more | {"max_model_len": 32 * 4, "num_pages": 32 * (1 + config.layer_groups.num_window_groups)}
        actual = run(requests, **more)
        assert (actual.tokens, actual.logprobs) == (together.tokens, together.logprobs), name
        if "num_pages" in more and None in config.windows:  # with a window in all layers, these pages are enough
            assert actual.preemptions > 0
    eager = run(requests, enforce_eager=True, overlap_scheduling=False)
    assert (eager.tokens, eager.logprobs) == (together.tokens, together.logprobs)
    for alone in requests if every else requests[::5]:
        actual = run([alone])
        assert actual.tokens[alone.uid] == together.tokens[alone.uid]
        assert actual.logprobs[alone.uid] == together.logprobs[alone.uid]
