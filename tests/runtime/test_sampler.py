"""The sampler against known distributions, and its contract: a sample depends on (seed, position) only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lockstep.comm.base import Communicator, SingleRank
from lockstep.runtime.model.embedding import Logits
from lockstep.runtime.plan import Admission
from lockstep.runtime.sampling import sampler as sampler_module
from lockstep.runtime.sampling.sampler import Sampler
from lockstep.runtime.sampling_params import MAX_REPETITION_PENALTY, MIN_TEMPERATURE, SamplingParams

from ranks import run_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCAB = 50


def sampler(*params: SamplingParams, prompt: int = 4, stop_ids: tuple[int, ...] = (), device: str = "cpu") -> Sampler:
    actual = Sampler(len(params), torch.device(device))
    for slot, p in enumerate(params):
        actual.admit(
            Admission(
                slot=slot,
                tokens=np.zeros(prompt, np.int32),
                num_prompt_tokens=prompt,
                params=p,
                stop_ids=list(stop_ids),
            )
        )
    return actual


def whole(logits: torch.Tensor) -> Logits:
    """A copy of logits [S, V], as the only rank has them."""
    return Logits(SingleRank(), logits.clone(), logits.shape[1])


def draw(params: SamplingParams, logits: torch.Tensor, positions: int = 4000) -> torch.Tensor:
    """Return the frequency of each token over many positions, [V]."""
    device = logits.device
    s = sampler(params, device=str(device))
    positions_of_rows = np.arange(10, 10 + positions, dtype=np.int32)
    rows = whole(logits.expand(positions, -1))
    tokens = torch.zeros(1, 1, dtype=torch.int32, device=device)
    actual = s.sample(rows, np.zeros(positions, np.int32), positions_of_rows, tokens)
    return torch.bincount(actual, minlength=logits.shape[-1]).cpu() / positions


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(VOCAB) * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}]
)
def test_sampler_frequencies_match_transformers(logits: torch.Tensor, options: dict[str, Any], device: str) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    expected = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(-1)[0]  # type: ignore[arg-type]
    actual = draw(SamplingParams(temperature=0.8, seed=11, **options), logits.to(device))
    assert not actual[expected == 0].any(), "a token that is excluded was drawn"
    # 4 standard deviations of a frequency over 4000 draws
    assert ((actual - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()


def test_sample_depends_on_seed_and_position_only(logits: torch.Tensor) -> None:
    rows = torch.stack([logits, logits.roll(1), logits * 0.5, logits])
    params = [SamplingParams(temperature=1.0, seed=s, top_k=k) for s, k in ((1, 0), (2, 7), (1, 3), (5, 0))]
    positions = np.array([6, 9, 6, 30], np.int32)
    tokens = torch.zeros(4, 1, dtype=torch.int32)
    together = sampler(*params).sample(whole(rows), np.arange(4, dtype=np.int32), positions, tokens)
    order = [2, 0, 3, 1]
    s = sampler(*[params[i] for i in order])
    shuffled = s.sample(whole(rows[order]), np.arange(4, dtype=np.int32), positions[order], tokens)
    assert shuffled.tolist() == together[order].tolist()
    for i in range(4):
        alone = sampler(params[i]).sample(whole(rows[i : i + 1]), np.zeros(1, np.int32), positions[i : i + 1], tokens)
        assert alone.item() == together[i]


MIXED = [
    SamplingParams(temperature=0, seed=1),
    SamplingParams(temperature=0.7, seed=2),
    SamplingParams(temperature=1.3, seed=3, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.0, seed=4, top_k=64, min_p=0.01),
    SamplingParams(temperature=0, seed=5, top_k=3),
    SamplingParams(temperature=1.0, seed=6, top_p=0.8),
    SamplingParams(temperature=1.0, seed=7, top_k=70),
    SamplingParams(temperature=1.0, seed=8, repetition_penalty=1.3, top_k=10),
]
FEW = [p for p in MIXED if p.repetition_penalty == 1 and (p.temperature == 0 or p.top_p == 1 or p.top_k > 0)][:5]


@pytest.mark.parametrize("vocab", [VOCAB, 61, 501])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("params", [MIXED, FEW], ids=["mixed", "few"])
def test_vocabulary_shards_sample_the_tokens_of_one_rank(params: list[SamplingParams], size: int, vocab: int) -> None:
    """Coarse logits, so that many are equal; 61 and 501 leave padding on the last rank."""
    torch.manual_seed(vocab)
    rows = (torch.randn(len(params), vocab) * 8).round() / 4
    slots, tokens = np.arange(len(params), dtype=np.int32), torch.arange(20, dtype=torch.int32).expand(len(params), 20)
    width = -(-vocab // size)

    def one(position: int) -> list[int]:
        positions_of_rows = np.full(len(params), position, np.int32)
        return sampler(*params).sample(whole(rows), slots, positions_of_rows, tokens).tolist()

    def each(comm: Communicator) -> list[list[int]]:
        shard = torch.full((len(params), width), 9.0)  # more than any other: padding must not win
        unpadded = rows[:, comm.rank * width : (comm.rank + 1) * width]
        shard[:, : unpadded.shape[1]] = unpadded
        s, actual = sampler(*params), []
        for position in range(10, 20):
            logits = Logits(comm, shard, vocab)
            logits = logits.replicated() if s.params["needs_full_logits"][slots].any() else logits
            actual.append(s.sample(logits, slots, np.full(len(params), position, np.int32), tokens).tolist())
        return actual

    expected = [one(position) for position in range(10, 20)]
    assert not sampler(*FEW).params["needs_full_logits"].any()
    assert run_ranks(size, each) == [expected] * size


def test_candidates_give_the_tokens_of_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k among the best of a row, against top-k among all of it."""
    params = [SamplingParams(temperature=1.1, seed=seed, top_k=k) for seed, k in enumerate((1, 2, 5, 33, 64))]
    torch.manual_seed(5)
    rows = (torch.randn(len(params), 3000) * 8).round() / 4
    slots, tokens = np.arange(len(params), dtype=np.int32), torch.zeros(len(params), 1, dtype=torch.int32)
    actual = []
    for candidates in (sampler_module.MAX_CANDIDATES, 0):
        monkeypatch.setattr(sampler_module, "MAX_CANDIDATES", candidates)
        s = sampler(*params)
        assert s.params["needs_full_logits"].all() == (candidates == 0)
        positions = [np.full(len(params), p, np.int32) for p in range(50)]
        actual.append(
            [s.sample(whole(rows), slots, positions_of_rows, tokens).tolist() for positions_of_rows in positions]
        )
    assert actual[0] == actual[1]
    assert len({tuple(step) for step in actual[0]}) > 40


def test_noise_is_independent_over_seeds_and_positions(logits: torch.Tensor) -> None:
    flat = torch.zeros(1, 1000)
    tokens = torch.zeros(1, 1, dtype=torch.int32)
    drawn = {}
    for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63)):
        s = sampler(SamplingParams(temperature=1.0, seed=seed))
        drawn[seed] = [
            s.sample(whole(flat), np.zeros(1, np.int32), np.array([p], np.int32), tokens).item() for p in range(60)
        ]
    every = [t for actual in drawn.values() for t in actual]
    assert len(set(every)) > 280  # 360 draws of 1000: about 302 distinct if independent
    for seed, actual in drawn.items():
        for other, others in drawn.items():
            shifted = [sum(a == b for a, b in zip(actual, others[d:], strict=False)) for d in range(4)]
            assert seed == other or max(shifted) < 5


def test_batch_of_greedy_and_random_rows(logits: torch.Tensor) -> None:
    s = sampler(SamplingParams(temperature=0, seed=1), SamplingParams(temperature=2.0, seed=1))
    actual = {
        tuple(
            s.sample(
                whole(logits.expand(2, -1)),
                np.arange(2, dtype=np.int32),
                np.array([p, p], np.int32),
                torch.zeros(2, 1, dtype=torch.int32),
            ).tolist()
        )
        for p in range(30)
    }
    assert {greedy for greedy, _ in actual} == {int(logits.argmax())}
    assert len({random for _, random in actual}) > 5


def test_penalties(logits: torch.Tensor) -> None:
    prompt, output = [3, 3, 8], [8, 9, 9, 9]
    tokens = torch.tensor([prompt + output + [44] * 3], dtype=torch.int32)  # beyond the position: a previous owner's
    p = SamplingParams(temperature=0, seed=0, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3)
    row = whole(logits[None])
    sampler(p, prompt=len(prompt)).sample(row, np.zeros(1, np.int32), np.array([7], np.int32), tokens)
    seen = torch.tensor([prompt + output])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(seen, logits[None].clone())[0]  # type: ignore[arg-type]
    expected[8] -= 0.7 + 0.3
    expected[9] -= 0.7 + 0.3 * 3
    torch.testing.assert_close(row.shard[0], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_penalties_of_many_rows_match_a_loop(device: str) -> None:
    """Against loops over tokens; more rows than are penalized at once, slots in another order than rows."""
    random = np.random.default_rng(5)
    count, vocab, length, prompt = 45, 30, 40, 6
    params = [
        SamplingParams(temperature=0, seed=0)
        if slot % 5 == 0
        else SamplingParams(
            temperature=0,
            seed=0,
            repetition_penalty=float(random.choice([1, 0.8, 1.3])),
            presence_penalty=float(random.choice([0, -0.5, 1.1])),
            frequency_penalty=float(random.choice([0, 0.4])),
            logit_bias={3: -1.5, int(slot) % 3: 2.0} if slot % 4 == 0 else {},
        )
        for slot in range(count)
    ]
    slots, positions = (
        random.permutation(count).astype(np.int32),
        random.integers(prompt, length, count).astype(np.int32),
    )
    tokens, rows = random.integers(0, vocab, (count, length)).astype(np.int32), torch.randn(count, vocab)
    actual = whole(rows.to(device))
    sampler(*params, prompt=prompt, device=device).sample(actual, slots, positions, torch.from_numpy(tokens).to(device))
    for row, slot, position in zip(actual.shard.cpu(), slots, positions, strict=True):
        p, said = params[slot], tokens[slot, prompt:position].tolist()
        expected = rows[next(i for i in range(count) if slots[i] == slot)].clone()
        for token in set(tokens[slot, :position].tolist()):
            expected[token] *= 1 / p.repetition_penalty if expected[token] > 0 else p.repetition_penalty
        for token in set(said):
            expected[token] -= p.presence_penalty + p.frequency_penalty * said.count(token)
        for token, bias in p.logit_bias.items():
            expected[token] += bias
        torch.testing.assert_close(row, expected)


def test_logit_bias_and_min_tokens(logits: torch.Tensor) -> None:
    p = SamplingParams(temperature=0, seed=0, logit_bias={7: 100.0, 8: 80.0}, min_tokens=2)
    s = sampler(p, prompt=4, stop_ids=(7,))
    tokens = torch.zeros(1, 10, dtype=torch.int32)
    actual = [
        s.sample(whole(logits[None]), np.zeros(1, np.int32), np.array([n], np.int32), tokens).item() for n in (4, 5, 6)
    ]
    assert actual == [8, 8, 7], "the stop id must not come before two tokens"


def test_top_p_keeps_the_most_likely_token(logits: torch.Tensor) -> None:
    assert draw(SamplingParams(temperature=1.0, top_p=1e-6, seed=4), logits, 50)[logits.argmax()] == 1


def test_uniform_distribution_is_sampled_uniformly() -> None:
    actual = draw(SamplingParams(temperature=1.0, seed=9), torch.zeros(10), 20_000)
    assert (actual - 0.1).abs().max() < 0.01


def test_tiny_temperature_is_nearly_greedy(logits: torch.Tensor) -> None:
    assert draw(SamplingParams(temperature=1e-4, seed=4), logits, 50)[logits.argmax()] == 1


ALL_METHODS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_k": 5, "top_p": 0.9},
    {"top_p": 0.9},
    {"min_p": 0.5},
    {"top_k": 70},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", ALL_METHODS, ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-36, 9.9e-6, MIN_TEMPERATURE])
@pytest.mark.parametrize("scale", [1.0, 1e9, 1e30])
def test_tiny_temperatures_are_greedy(temperature: float, options: dict[str, Any], scale: float, device: str) -> None:
    """Also where logits divided by the temperature are not finite in float32."""
    torch.manual_seed(1)
    logits = torch.randn(VOCAB) * scale
    logits[40], logits[9] = 5 * scale, 4 * scale  # many tokens before 40 are above 0
    logits[[3, 30]] = -torch.inf
    p = SamplingParams(temperature=temperature, seed=4, **options)
    assert draw(p, logits.to(device), 50)[40] == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_k": 70}], ids=str)
def test_tiny_top_p_is_greedy(logits: torch.Tensor, options: dict[str, Any], device: str) -> None:
    for top_p in (5e-324, 1e-46, 1e-40, 1e-38):
        p = SamplingParams(temperature=1.0, top_p=top_p, seed=4, **options)
        assert draw(p, logits.to(device), 50)[logits.argmax()] == 1


@pytest.mark.parametrize("penalty", [1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY])
def test_extreme_repetition_penalties_stay_finite(penalty: float) -> None:
    """A repeated token wins with the least one and loses with the greatest, at the lowest temperature, too."""
    logits = torch.full((VOCAB,), 1e3)
    logits[:2] = 2e3  # tokens 0 and 1 are the likeliest; 0 has been in the prompt
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 70}):
        p = SamplingParams(temperature=MIN_TEMPERATURE, repetition_penalty=penalty, seed=1, **options)
        actual = sampler(p).sample(
            whole(logits[None]), np.zeros(1, np.int32), np.array([4], np.int32), torch.zeros(1, 8, dtype=torch.int32)
        )
        assert actual.tolist() == [0 if penalty < 1 else 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be between 0 and 2"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": 0}, r"top_p=0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -2}, "top_k=-2 must be at least -1"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer"),
        ({"top_k": 2**31}, "top_k=2147483648 must be at least -1 and at most 2147483647"),
        ({"max_tokens": 10**30}, "at most 2147483647"),
        ({"temperature": 10**400}, "temperature=1000+[.]{3}0+ must be between 0 and 2"),
        ({"min_p": 2}, "min_p=2"),
        ({"n": 0}, "n=0 must be between 1 and 128"),
        ({"n": True}, "n=True must be an integer"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"min_tokens": 20}, r"min_tokens=20 must be at most max_tokens \(16\)"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be between 1e-06 and 1000000"),
        ({"repetition_penalty": 1e39}, "repetition_penalty=1e"),
        ({"presence_penalty": 3}, "presence_penalty=3 must be between -2 and 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3"),
        ({"logprobs": 21}, "logprobs=21 must be between 0 and 20"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"stop": ""}, "stop='' must be a non-empty string"),
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"stop": 5}, "stop=5 must be a string or a list"),
        ({"logit_bias": {1: 200}}, r"logit_bias\[1\]=200 must be between -100 and 100"),
        ({"logit_bias": {"a": 1}}, "integer token ids"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids='x' must be integers"),
    ],
)
def test_sampling_params_refuse_invalid_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
