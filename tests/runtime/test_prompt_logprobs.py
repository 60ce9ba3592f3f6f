"""Log-probabilities of prompts, against transformers' logits for the whole prompt at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lockstep import LLM, SamplingParams
from lockstep.runtime.plan import TokenLogprobs
from lockstep.runtime.request import Request
from lockstep.runtime.sampling import logprobs as logprobs_module

from engines import Results, request, run_engine

TOLERANCE = 1e-4  # float32; the order of sums differs from transformers
LENGTHS = (1, 2, 8, 9, 40, 63, 40, 17)


def requests(width: int | None = 3) -> list[Request]:
    """Return prompts with common prefixes, two of them equal; every second one wants log-probabilities."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 131, n).tolist() for n in LENGTHS]
    prompts[6] = prompts[4]
    prompts[7] = prompts[4][:12] + prompts[7][:5]
    actual = []
    for i, prompt in enumerate(prompts):
        expected = width if i % 2 == 0 or i == 7 else None
        actual.append(request(i, prompt, [2], temperature=1, max_tokens=12, prompt_logprobs=expected))
    return actual


def expected_of(folder: Path, r: Request) -> dict[int, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor(r.tokens[None].astype(np.int64))).logits[0].log_softmax(-1)
    return {position: logprobs[position - 1] for position in range(1, r.num_prompt_tokens)}


def check(entry: TokenLogprobs, token: int, expected: torch.Tensor, width: int) -> None:
    """Tokens that are as likely within the tolerance may come in any order."""
    assert entry.token == pytest.approx(float(expected[token]), abs=TOLERANCE)
    ahead = int((expected > expected[token] + TOLERANCE).sum())
    not_behind = int((expected > expected[token] - TOLERANCE).sum())
    assert ahead + 1 <= entry.rank <= max(1, not_behind)
    assert entry.top == pytest.approx(expected.topk(width).values.tolist(), abs=TOLERANCE)
    assert entry.top == pytest.approx(expected[entry.top_ids].tolist(), abs=TOLERANCE)
    assert len(set(entry.top_ids)) == width


@pytest.fixture(scope="module")
def baseline(llama_folder: Path) -> Results:
    return run_engine(llama_folder, requests())


@pytest.fixture(scope="module")
def expected(llama_folder: Path) -> dict[int, dict[int, torch.Tensor]]:
    """The log-probabilities by transformers of each prompt that wants them, by position."""
    return {
        r.uid: expected_of(llama_folder, r)
        for r in requests()
        if r.params.prompt_logprobs is not None and r.num_prompt_tokens > 1
    }


def check_all(actual: Results, expected: dict[int, dict[int, torch.Tensor]]) -> None:
    assert actual.prompts.keys() == expected.keys()
    for r in requests():
        for position, entry in actual.prompts.get(r.uid, {}).items():
            check(entry, int(r.tokens[position]), expected[r.uid][position], 3)
        assert actual.prompts.get(r.uid, {}).keys() == expected.get(r.uid, {}).keys()


def test_prompt_logprobs_match_transformers(baseline: Results, expected: dict[int, dict[int, torch.Tensor]]) -> None:
    check_all(baseline, expected)


def test_prompt_logprobs_do_not_change_tokens(llama_folder: Path, baseline: Results) -> None:
    assert run_engine(llama_folder, requests(width=None)).tokens == baseline.tokens


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "chunks of 7 tokens": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "one token at a time": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "two at a time, so that the cache is warm": {"max_num_seqs": 2},
    "results one step late": {"overlap": True},
    "two ranks": {"tp": 2},
    "few pages": {"num_pages": 21, "max_model_len": 84},
    "two ranks, few pages, chunks": {
        "tp": 2,
        "num_pages": 21,
        "max_model_len": 84,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 8,
    },
}


@pytest.mark.parametrize("options", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_prompt_logprobs_are_independent_of_batching(
    llama_folder: Path,
    baseline: Results,
    expected: dict[int, dict[int, torch.Tensor]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logprobs_module, "ROWS_AT_ONCE", 5)
    actual = run_engine(llama_folder, requests(), **options)
    assert actual.tokens == baseline.tokens
    check_all(actual, expected)


def test_prompt_logprobs_of_llm_generate() -> None:
    """As a user gets them: the text of each candidate, nothing for the first token, and once for all outputs."""
    with LLM(device="cpu", num_pages=64) as llm:
        params = SamplingParams(n=2, seed=1, max_tokens=4, prompt_logprobs=2)
        llm.generate("And the LORD said", SamplingParams(max_tokens=1), use_tqdm=False)  # the cache is warm
        requests, without = llm.generate(["And the LORD said"] * 2, [params, SamplingParams()], use_tqdm=False)
        assert without.prompt_logprobs is None
        assert requests.prompt_logprobs is not None
        assert len(requests.prompt_logprobs) == len(requests.prompt_token_ids)
        assert requests.prompt_logprobs[0] is None
        for token, entry in zip(requests.prompt_token_ids[1:], requests.prompt_logprobs[1:], strict=True):
            assert entry is not None
            assert next(iter(entry)) == token
            assert entry[token].decoded_token == llm.tokenizer.decode([token])
            assert len(entry) in (2, 3)
            assert sorted(c.rank for c in entry.values())[:2] == [1, 2]


@pytest.mark.parametrize("number", [-1, 21, 1.5, True])
def test_prompt_logprobs_refuses_invalid_values(number: Any) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs="):
        SamplingParams(prompt_logprobs=number)


@pytest.mark.gpu
def test_prompt_logprobs_on_gpu_match_cpu(llama_folder: Path, baseline: Results) -> None:
    actual = run_engine(llama_folder, requests(), device="cuda", dtype="float32")
    for uid, entries in baseline.prompts.items():
        assert actual.prompts[uid].keys() == entries.keys()
        for position, entry in entries.items():
            assert actual.prompts[uid][position].token == pytest.approx(entry.token, abs=1e-3)
