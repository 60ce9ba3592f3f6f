"""Generation on GPUs through Ray actors: with every way of adding up, several ranks give what one rank gives.

In bfloat16 the order of additions differs with the number of ranks. So texts are compared token by token as long as
they agree, by their log-probabilities, and where they part, the two tokens must have been about as likely.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from lockstep import LLM, SamplingParams
from lockstep.comm.all_reduce_names import AllReduceChoice
from lockstep.runtime.outputs import CompletionOutput

from rank_processes import PLACES, on_gpus, place_id

PROMPTS = ["In the beginning", "And the LORD spake unto Moses, saying,", "Blessed is the man that"]
ASKED = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5)
DRAWN = [SamplingParams(temperature=0.8, seed=3, top_k=top_k, max_tokens=32, ignore_eos=True) for top_k in (-1, 20)]
SMALL: dict[str, Any] = {"num_pages": 512, "max_num_seqs": 8, "max_num_batched_tokens": 256, "step_timeout": 30.0}
OF_DEMO = [place for place in PLACES if place[0] <= 4]  # the demo model has four heads
TOLERANCE = 0.25  # of a log-probability in bfloat16, whose logits of up to 32 are multiples of 1/8


@contextmanager
def engine(**options: Any) -> Iterator[LLM]:
    llm = LLM(**{"device": "cuda", "dtype": "bfloat16", **SMALL, **options})
    try:
        yield llm
    finally:
        llm.close()


def outputs(llm: LLM, params: SamplingParams) -> list[CompletionOutput]:
    return [request.outputs[0] for request in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def alone() -> list[CompletionOutput]:
    """Return the outputs of one rank."""
    with engine() as llm:
        return outputs(llm, ASKED)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("choice", "place"),
    [
        pytest.param(choice, place, id=f"{choice}-{place_id(place)}")
        for choice in get_args(AllReduceChoice)
        for place in (*OF_DEMO, (3, 1))
        if choice == "auto" or place[0] != 3
    ],
)
def test_ranks_say_what_one_says(choice: str, place: tuple[int, int], alone: list[CompletionOutput]) -> None:
    size, gpus = place
    where = on_gpus(size, gpus)
    options = {"nccl_library": where.get("library"), "gpus_per_rank": gpus / size}
    with engine(tensor_parallel_size=size, all_reduce=choice, **options) as llm:
        several = outputs(llm, ASKED)
        for params in DRAWN:  # within a step's graph, and outside, where log-probabilities are asked for
            inside, *others = (outputs(llm, asked) for asked in (params, params, replace(params, logprobs=1)))
            for other in others:
                assert [output.token_ids for output in inside] == [output.token_ids for output in other]
    for one, other in zip(alone, several, strict=True):
        assert agreeing(one, other) > 0


def agreeing(one: CompletionOutput, other: CompletionOutput) -> int:
    """Tokens that both say; asserts that they were as likely to both, and where they part, that either would do."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    steps = zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True)
    for count, (token, its, of_one, of_other) in enumerate(steps):
        assert abs(of_one[token].logprob - of_other[its].logprob) < TOLERANCE
        if token != its:
            assert its in of_one
            assert abs(of_one[token].logprob - of_one[its].logprob) < TOLERANCE
            return count
    return len(one.token_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [(1, 1), *OF_DEMO], ids=place_id)
def test_deterministic_ranks_say_the_same_to_one_request_and_to_many(place: tuple[int, int]) -> None:
    """Bit for bit, with chunks and preemptions on one side only."""
    size, gpus = place
    where = on_gpus(size, gpus)
    options = {"nccl_library": where.get("library"), "gpus_per_rank": gpus / size, "deterministic": True}
    asked = [replace(params, logprobs=2) for params in (ASKED, *DRAWN)]
    with engine(tensor_parallel_size=size, **options) as llm:
        alone = [[llm.generate([prompt], params)[0].outputs[0] for prompt in PROMPTS] for params in asked]
    few = {"num_pages": 9, "max_model_len": 96, "max_num_batched_tokens": 8}
    with engine(tensor_parallel_size=size, **options, **few) as llm:
        for params, wanted in zip(asked, alone, strict=True):
            for found, one in zip(outputs(llm, params), wanted, strict=True):
                assert (found.token_ids, found.logprobs) == (one.token_ids, one.logprobs)
