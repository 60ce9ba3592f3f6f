"""The requests of the engine benchmarks: how many, how long, and how they are sampled."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are submitted together and run to their full length, with n outputs for each prompt."""

    input_lens: Sequence[int]
    output_lens: Sequence[int]
    n: int = 1
    sampling: Mapping[str, float] = field(default_factory=dict)  # arguments of SamplingParams for every request

    @property
    def num_requests(self) -> int:
        """The number of requests to the engine, one for each output."""
        return len(self.input_lens) * self.n

    def check(self, max_model_len: int) -> None:
        """Raise ValueError if a request does not fit into the context."""
        input_len, output_len = max(zip(self.input_lens, self.output_lens, strict=True), key=sum)
        if input_len + output_len > max_model_len:
            raise ValueError(
                f"an input of {input_len} and an output of {output_len} tokens make {input_len + output_len},"
                f" but the context is {max_model_len}; shorten them, or raise max_model_len or the KV cache"
            )


def batch(size: int, input_len: int, output_len: int, n: int = 1) -> Workload:
    """Return `size` prompts of the same lengths."""
    return Workload(input_lens=[input_len] * size, output_lens=[output_len] * size, n=n)


def uniform(num_prompts: int, input_len: int, output_len: int, random_range_ratio: float, seed: int) -> Workload:
    """Return prompts with lengths uniform in `length_range` of input_len and output_len."""
    generator = random.Random(seed)
    inputs, outputs = (
        [generator.randint(*length_range(middle, random_range_ratio)) for _ in range(num_prompts)]
        for middle in (input_len, output_len)
    )
    return Workload(input_lens=inputs, output_lens=outputs)


def nano() -> Workload:
    """Return the workload of nano-vllm and mini-sglang: 256 prompts, inputs and outputs of 100 to 1024 tokens."""
    generator = random.Random(0)
    inputs, outputs = ([generator.randint(100, 1024) for _ in range(256)] for _ in range(2))
    return Workload(input_lens=inputs, output_lens=outputs, sampling={"temperature": 0.6})


def length_range(middle: int, ratio: float) -> tuple[int, int]:
    """Return (smallest, largest) length: middle * (1 -/+ ratio), rounded outwards, at least 1."""
    return max(1, math.floor(middle * (1 - ratio))), math.ceil(middle * (1 + ratio))
