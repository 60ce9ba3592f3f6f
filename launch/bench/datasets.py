"""The prompts of a load: made-up token ids, or texts from a file. The same seed makes the same prompts."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.tokenizer import Tokenizer
from .serve_config import ServeBenchConfig

log = logging.getLogger(__name__)
ATTEMPTS = 10  # to make a text that has as many tokens as it should
# vLLM's bounds of what is taken from ShareGPT, in tokens.
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048


@dataclass(frozen=True)
class Prompt:
    """A text or token ids; `num_tokens` is 0 if only the server knows."""

    content: str | list[int]
    num_tokens: int
    output_len: int


def needs_tokenizer(load: ServeBenchConfig) -> bool:
    return load.dataset_name == "sharegpt" or (load.chat and not load.from_file)


def make_prompts(load: ServeBenchConfig, tokenizer: Tokenizer | None) -> list[Prompt]:
    """As many prompts as the load has; `tokenizer` where it needs one. Raises ValueError for a file without prompts."""
    if load.from_file:
        assert load.dataset_path is not None
        draw = random.Random(load.seed)
        lines = _read(load.dataset_path, as_lines=load.dataset_name == "custom")
        if load.dataset_name == "custom":
            found = _custom(lines, load.custom_output_len, draw)
        else:
            assert tokenizer is not None
            found = _sharegpt(lines, tokenizer, load.sharegpt_output_len, load.num_prompts, draw)
        if not found:
            raise ValueError(f"{load.dataset_path} has no prompt that --dataset-name {load.dataset_name} can use")
        return list(islice(cycle(found), load.num_prompts))
    ids = Ids(load.seed, load.random_vocab_size)
    made = _random(load, ids) if load.dataset_name == "random" else _prefix_repetition(load, ids)
    return [Prompt(p, len(p), n) if tokenizer is None else _as_text(p, n, tokenizer, ids) for p, n in made]


class Ids:
    """Random token ids, and the lengths of lists of them."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.draw, self._vocab_size = np.random.default_rng(seed), vocab_size

    def __call__(self, number: int) -> list[int]:
        found: list[int] = self.draw.integers(0, self._vocab_size, max(0, number)).tolist()
        return found

    def lengths(self, middle: int, ratio: float, number: int) -> list[int]:
        """Uniform in middle * (1 -/+ ratio), rounded outwards, at least 1."""
        low, high = math.floor(middle * (1 - ratio)), math.ceil(middle * (1 + ratio))
        found: list[int] = self.draw.integers(max(1, low), high, number, endpoint=True).tolist()
        return found


def _random(load: ServeBenchConfig, ids: Ids) -> list[tuple[list[int], int]]:
    inputs = ids.lengths(load.random_input_len, load.random_range_ratio, load.num_prompts)
    outputs = ids.lengths(load.random_output_len, load.random_range_ratio, load.num_prompts)
    prefix = ids(load.random_prefix_len)
    return [(prefix + ids(length), output) for length, output in zip(inputs, outputs, strict=True)]


def _prefix_repetition(load: ServeBenchConfig, ids: Ids) -> list[tuple[list[int], int]]:
    """Each prefix is as often used as every other, or once more; in random order."""
    prefixes = [ids(load.prefix_repetition_prefix_len) for _ in range(load.prefix_repetition_num_prefixes)]
    order = ids.draw.permutation(load.num_prompts) % len(prefixes)
    suffix_len, output_len = load.prefix_repetition_suffix_len, load.prefix_repetition_output_len
    return [(prefixes[i] + ids(suffix_len), output_len) for i in order]


def _as_text(tokens: list[int], output_len: int, tokenizer: Tokenizer, ids: Callable[[int], list[int]]) -> Prompt:
    """A text that the tokenizer makes as many tokens of: cut, or filled up, until it does."""
    length = len(tokens)
    for _ in range(ATTEMPTS):
        text = tokenizer.decode(tokens)
        found = tokenizer.encode(text)
        if len(found) == length:
            break
        tokens = found[:length] + ids(length - len(found))
    return Prompt(text, len(found), output_len)


def _custom(lines: Sequence[Any], output_len: int, draw: random.Random) -> list[Prompt]:
    texts = [line["prompt"] for line in lines if isinstance(line, dict) and isinstance(line.get("prompt"), str)]
    draw.shuffle(texts)
    return [Prompt(text, 0, output_len) for text in texts if text]


def _sharegpt(
    conversations: Sequence[Any], tokenizer: Tokenizer, output_len: int | None, number: int, draw: random.Random
) -> list[Prompt]:
    """The first two turns of conversations: a prompt and how long its answer was."""
    turns = [c["conversations"] for c in conversations if isinstance(c, dict) and len(c.get("conversations", [])) > 1]
    draw.shuffle(turns)
    found: list[Prompt] = []
    for question, answer in ((t[0]["value"], t[1]["value"]) for t in turns):
        prompt_len, answer_len = len(tokenizer.encode(question)), len(tokenizer.encode(answer))
        wanted = output_len or answer_len
        long_enough = prompt_len >= SHORTEST and (output_len is not None or answer_len >= SHORTEST)
        if long_enough and prompt_len <= LONGEST_PROMPT and prompt_len + wanted <= LONGEST:
            found.append(Prompt(question, prompt_len, wanted))
        if len(found) == number:
            break
    return found


def _read(path: Path, *, as_lines: bool) -> list[Any]:
    """The entries of a JSON list, or of a file with one JSON value in each line."""
    try:
        text = path.read_text()
        found = [json.loads(line) for line in text.split("\n") if line.strip()] if as_lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset-path {path}: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"--dataset-path {path} is no list of conversations; it holds a {type(found).__name__}")
    return found
