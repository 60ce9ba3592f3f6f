"""The steps that a rank rehearses before it is ready: the first requests then wait for no compiler.

They also show the memory that a step needs. All ranks launch the same steps, as later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .config import Config
from .plan import Admission, StepPlan
from .runner.graphs import graph_sizes
from .sampling.sampler import MAX_CANDIDATES
from .sampling_params import SamplingParams

# Each samples with kernels of its own: the first from the logits of a shard, the others from float32 logits of
# the whole vocabulary. The largest step samples greedily.
SAMPLED = (
    SamplingParams(seed=0, max_tokens=1, top_k=1),
    SamplingParams(seed=0, max_tokens=1, logprobs=1),
    SamplingParams(seed=0, max_tokens=1, top_k=1, logit_bias={0: 1.0}),
    SamplingParams(seed=0, max_tokens=1, top_k=MAX_CANDIDATES + 1),
    SamplingParams(seed=0, max_tokens=1, top_p=0.5),
)


def largest_step(config: Config) -> StepPlan:
    """Return the largest step that `config`, which is resolved, allows, of few requests."""
    assert config.max_model_len is not None
    budget, counts = config.max_num_batched_tokens, list[int]()
    while budget > 0 and len(counts) < config.max_num_seqs:
        counts.append(min(budget, config.max_model_len - 1))  # the sampled token needs a place, too
        budget -= counts[-1]
    return _prompts(counts, SamplingParams(seed=0, max_tokens=1))


def sampling_steps() -> Iterator[StepPlan]:
    """Yield a step for each other way to sample."""
    for params in SAMPLED:
        yield _prompts([1], params)


def decode_steps(config: Config, max_rows: int) -> Iterator[StepPlan]:
    """Yield a decode step for each number of rows that graphs would have; for engines without graphs."""
    max_rows = min(max_rows, config.max_num_seqs, config.max_num_batched_tokens)
    yield _prompts([1] * max_rows, SamplingParams(seed=0, max_tokens=1))
    for num_rows in graph_sizes(max_rows):
        yield _step([1] * num_rows, first_position=1, num_decoding=num_rows, admitted=[])


def _prompts(counts: Sequence[int], params: SamplingParams) -> StepPlan:
    """Return a step of one prompt in each of the first slots, of `counts` tokens."""
    empty = np.zeros(0, np.int32)
    admitted = [Admission(slot, empty, 0, params, []) for slot in range(len(counts))]
    return _step(counts, first_position=0, num_decoding=0, admitted=admitted)


def _step(counts: Sequence[int], *, first_position: int, num_decoding: int, admitted: list[Admission]) -> StepPlan:
    """Return a step of the first slots, each from `first_position` on; all their pages are page 0."""
    rows, empty = np.arange(len(counts), dtype=np.int32), np.zeros(0, np.int32)
    return StepPlan(
        step=0,
        admitted=admitted,
        slots=rows,
        starts=np.full_like(rows, first_position),
        counts=np.array(counts, np.int32),
        num_decoding=num_decoding,
        sampled_rows=rows,
        page_writes=empty,
        state_saves=empty,
    )
