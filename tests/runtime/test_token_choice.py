"""allowed_token_ids, bad_words and logprob_token_ids: the sampler and the engine against brute force."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from lockstep.comm.base import SingleRank
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.plan import Admission
from lockstep.runtime.request import Request
from lockstep.runtime.sampling.sampler import Sampler
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.tokenizer import Tokenizer

from engines import Results, request, run_engine

VOCAB = 12
PROMPTS = 4


def completes(words: list[list[int]], output: list[int], token: int) -> bool:
    """Return whether the token completes a word after this output."""
    text = [*output, token]
    return any(text[-len(word) :] == word for word in words)


def permitted(words: list[list[int]], allowed: list[int] | None, output: list[int], vocab: int) -> list[int]:
    """The tokens that may come, one by one; bad words yield where they would leave none."""
    choice = sorted(set(allowed)) if allowed is not None else list(range(vocab))
    return [token for token in choice if not completes(words, output, token)] or choice


@pytest.mark.parametrize("seed", range(8))
def test_sampler_takes_the_best_permitted_token(seed: int) -> None:
    rng = random.Random(seed)
    rows, prompt = 16, rng.randrange(1, 6)
    words = [[rng.randrange(4) for _ in range(rng.randrange(1, 5))] for _ in range(rng.randrange(1, 9))]
    allowed = rng.choice([None, [0, 1, 2, 3], [2], [3, 0, 3]])
    params = SamplingParams(temperature=0, seed=seed, allowed_token_ids=allowed)
    sampler = Sampler(1, torch.device("cpu"))
    sampler.admit(Admission(0, np.zeros(prompt, np.int32), prompt, params, [], words))
    tokens = torch.tensor([[rng.randrange(4) for _ in range(40)]], dtype=torch.int32)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32))
    positions = np.array([rng.randrange(prompt, 30) for _ in range(rows)], np.int32)
    sampled = sampler.sample(Logits(SingleRank(), logits.clone(), VOCAB), np.zeros(rows, np.int32), positions, tokens)
    for row, position in enumerate(positions.tolist()):
        choice = permitted(words, allowed, tokens[0, prompt:position].tolist(), VOCAB)
        assert sampled[row] == max(choice, key=lambda token: float(logits[row, token]))


CHOICES: list[dict[str, Any]] = [
    {"allowed_token_ids": [5, 9, 70]},
    {"allowed_token_ids": list(range(20, 60)), "temperature": 1.3},
    {"allowed_token_ids": [3, 4, 5], "top_k": 2, "temperature": 1, "min_tokens": 3},
    {"temperature": 0},
]


def chosen_requests(words: list[list[int]]) -> list[Request]:
    rng = np.random.default_rng(3)
    plain = [
        request(i, rng.integers(3, 131, 4 + 5 * i).tolist(), **{"max_tokens": 24, "logprobs": 2} | options)
        for i, options in enumerate(CHOICES)
    ]
    return [replace(r, bad_words=words) for r in plain]


def greedy(folder: Path, r: Request) -> list[int]:
    """The tokens of a greedy request by transformers, with brute force."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    output: list[int] = []
    for _ in range(r.params.max_tokens or 0):
        with torch.inference_mode():
            ids = torch.tensor([[*r.tokens.tolist(), *output]])
            logits = model(ids).logits[0, -1]
        choice = permitted(r.bad_words, r.params.allowed_token_ids, output, len(logits))
        output.append(max(choice, key=lambda token: float(logits[token])))
    return output


@pytest.fixture(scope="module")
def words(llama_folder: Path) -> list[list[int]]:
    """Words that the requests would have without them: of one, two and three tokens."""
    free = run_engine(llama_folder, chosen_requests([])).tokens
    return [[free[3][2]], free[3][5:7], free[3][9:12], free[0][:2], [130, 1], [5, 5]]


@pytest.fixture(scope="module")
def one_rank(llama_folder: Path, words: list[list[int]]) -> Results:
    return run_engine(llama_folder, chosen_requests(words))


def test_engine_gives_the_tokens_of_brute_force(llama_folder: Path, words: list[list[int]], one_rank: Results) -> None:
    for r in chosen_requests(words):
        tokens = one_rank.tokens[r.uid]
        assert len(tokens) == 24
        for position, token in enumerate(tokens):
            assert token in permitted(words, r.params.allowed_token_ids, tokens[:position], 131)
        if r.params.is_greedy:
            assert tokens == greedy(llama_folder, r)


@pytest.mark.parametrize(("tp", "overlap"), [(1, True), (2, False), pytest.param(4, True, marks=pytest.mark.nightly)])
def test_choice_is_independent_of_ranks(
    llama_folder: Path, words: list[list[int]], one_rank: Results, tp: int, overlap: bool
) -> None:
    assert run_engine(llama_folder, chosen_requests(words), tp=tp, overlap=overlap).tokens == one_rank.tokens


@pytest.mark.parametrize("tp", [1, 2])
def test_logprobs_of_chosen_tokens_match_transformers(llama_folder: Path, tp: int) -> None:
    ids, prompt = [7, 130, 7, 64, 3], list(range(3, 40))
    requests = [
        request(0, prompt, logprobs=2),
        request(1, prompt, logprob_token_ids=ids),
        request(2, prompt[::-1], logprob_token_ids=[9], temperature=1),
        request(3, prompt),
    ]
    actual = run_engine(llama_folder, requests, tp=tp)
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="eager").eval()
    assert actual.logprobs.keys() == {0, 1, 2}
    assert actual.tokens[0] == actual.tokens[1] == actual.tokens[3]
    assert [entry.top_ranks for entry in actual.logprobs[0]] == [None] * 16
    for r in requests[1:3]:
        assert r.params.logprob_token_ids is not None
        text = [*r.tokens.tolist(), *actual.tokens[r.uid]]
        with torch.inference_mode():
            expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
        for i, entry in enumerate(actual.logprobs[r.uid]):
            row = expected[r.num_prompt_tokens + i - 1]
            assert entry.top_ids == r.params.logprob_token_ids
            assert entry.top == pytest.approx(row[entry.top_ids].tolist(), abs=1e-4)
            for value, rank in zip(entry.top, entry.top_ranks or (), strict=True):
                assert (row > value + 1e-4).sum() < rank <= max(1, (row > value - 1e-4).sum())
            assert entry.token == pytest.approx(float(row[actual.tokens[r.uid][i]]), abs=1e-4)


def test_words_are_tokenized_alone_and_after_a_space() -> None:
    tokenizer = Tokenizer(Path(DEMO_MODEL))
    sequences = tokenizer.encode_words(["LORD", " LORD", "Moses said"])
    spellings = ["LORD", " LORD", "Moses said", " Moses said"]
    assert sequences == [tokenizer.encode(text, add_special_tokens=False) for text in spellings]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"bad_words": ["a", " "]}, "bad_words=['a', ' '] must be a list of texts that are not blank"),
        ({"bad_words": ["a"] * 129}, "bad_words=129 words are too many; at most 128"),
        ({"bad_words": ["a" * 5000]}, "bad_words=5000 characters are too many; at most 4096"),
        ({"allowed_token_ids": []}, "allowed_token_ids=[] must be a list of at least one token id"),
        ({"allowed_token_ids": [1, True]}, "allowed_token_ids=True must be integers"),
        ({"logprob_token_ids": [1] * 129}, "logprob_token_ids=129 ids are too many; at most 128"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, "logprob_token_ids=2 ids do not go with logprobs=3"),
        (
            {"allowed_token_ids": [1], "structured_outputs": {"regex": "a"}},
            "allowed_token_ids=... does not go with structured_outputs; give one of them",
        ),
    ],
)
def test_wrong_values_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SamplingParams(**params)


def test_ids_beyond_the_vocabulary_and_without_a_way_on_are_refused(llama_folder: Path) -> None:
    params: list[dict[str, Any]] = [
        {"allowed_token_ids": [3, 131]},
        {"logprob_token_ids": [131]},
        {"allowed_token_ids": [7], "min_tokens": 2},
        {},
    ]
    requests = [request(i, [4, 5, 6], [7], **p) for i, p in enumerate(params)]
    ends = run_engine(llama_folder, requests).finished
    assert [ends[i].error for i in range(3)] == [
        "allowed_token_ids=131 is not a token id; the model has ids 0 to 130",
        "logprob_token_ids=131 is not a token id; the model has ids 0 to 130",
        "min_tokens=2 needs a token that does not end the output, but all of allowed_token_ids do; allow another one",
    ]
    assert ends[3].error is None
