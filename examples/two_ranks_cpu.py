"""Run two tensor-parallel ranks on a CPU and compare their tokens with those of one rank.

    python examples/two_ranks_cpu.py

Each rank is a Ray actor with half of the model. In float32 rounding at another TP size changes none of these tokens.
"""

from __future__ import annotations

from lockstep import LLM, SamplingParams

PROMPTS = ["In the beginning", "And it came to pass"]


def tokens(tensor_parallel_size: int) -> list[list[int]]:
    """Return the token ids of each output."""
    params = SamplingParams(temperature=0.8, max_tokens=24, seed=7)
    with LLM(device="cpu", tensor_parallel_size=tensor_parallel_size) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, params, use_tqdm=False)]


def main() -> None:
    one, two = tokens(1), tokens(2)
    print("one rank: ", one[0])
    print("two ranks:", two[0])
    if one != two:
        raise SystemExit("the tokens differ")
    print("equal tokens at TP=1 and TP=2")


if __name__ == "__main__":
    main()
