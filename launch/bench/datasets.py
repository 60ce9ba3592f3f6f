"""The prompts of `lockstep bench serve`: random token ids, or texts from a file. A seed fixes the prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.tokenizer import Tokenizer
from .serve_config import ServeBenchConfig
from .workload import length_range

ATTEMPTS = 10  # tries to make a text with the right number of tokens
# vLLM's bounds of the conversations that it takes from ShareGPT, in tokens.
MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOKENS = 4, 1024, 2048


@dataclass(frozen=True)
class DatasetPrompt:
    """A text or token ids; `num_tokens` is 0 if only the server knows."""

    content: str | list[int]
    num_tokens: int
    output_len: int


def needs_tokenizer(config: ServeBenchConfig) -> bool:
    """Return True if `make_prompts` needs a tokenizer."""
    return config.dataset_name == "sharegpt" or (config.is_chat and not config.reads_file)


def make_prompts(config: ServeBenchConfig, tokenizer: Tokenizer | None) -> list[DatasetPrompt]:
    """Return config.num_prompts prompts; raises ValueError for a file without usable prompts."""
    if config.reads_file:
        assert config.dataset_path is not None
        generator = random.Random(config.seed)
        lines = _read(config.dataset_path, as_lines=config.dataset_name == "custom")
        if config.dataset_name == "custom":
            prompts = _custom(lines, config.custom_output_len, generator)
        else:
            assert tokenizer is not None
            prompts = _sharegpt(lines, tokenizer, config.sharegpt_output_len, config.num_prompts, generator)
        if not prompts:
            raise ValueError(f"{config.dataset_path} has no prompt that --dataset-name {config.dataset_name} can use")
        return list(islice(cycle(prompts), config.num_prompts))
    source = RandomTokens(config.seed, config.random_vocab_size)
    pairs = _random(config, source) if config.dataset_name == "random" else _prefix_repetition(config, source)
    return [DatasetPrompt(p, len(p), n) if tokenizer is None else _as_text(p, n, tokenizer, source) for p, n in pairs]


class RandomTokens:
    """A source of random token ids below vocab_size."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        self.generator, self._vocab_size = np.random.default_rng(seed), vocab_size

    def ids(self, count: int) -> list[int]:
        """Return `count` token ids, none if it is negative."""
        ids: list[int] = self.generator.integers(0, self._vocab_size, max(0, count)).tolist()
        return ids


def _random(config: ServeBenchConfig, source: RandomTokens) -> list[tuple[list[int], int]]:
    ratio, count = config.random_range_ratio, config.num_prompts
    inputs, outputs = (
        source.generator.integers(*length_range(middle, ratio), count, endpoint=True).tolist()
        for middle in (config.random_input_len, config.random_output_len)
    )
    prefix = source.ids(config.random_prefix_len)
    return [(prefix + source.ids(length), output) for length, output in zip(inputs, outputs, strict=True)]


def _prefix_repetition(config: ServeBenchConfig, source: RandomTokens) -> list[tuple[list[int], int]]:
    """Return prompts in random order that use each prefix equally often, give or take one."""
    prefixes = [source.ids(config.prefix_repetition_prefix_len) for _ in range(config.prefix_repetition_num_prefixes)]
    order = source.generator.permutation(config.num_prompts) % len(prefixes)
    suffix_len, output_len = config.prefix_repetition_suffix_len, config.prefix_repetition_output_len
    return [(prefixes[i] + source.ids(suffix_len), output_len) for i in order]


def _as_text(tokens: list[int], output_len: int, tokenizer: Tokenizer, source: RandomTokens) -> DatasetPrompt:
    """Return a text of as many tokens, if some attempts of cutting and filling up find one."""
    length = len(tokens)
    for _ in range(ATTEMPTS):
        text = tokenizer.decode(tokens)
        encoded = tokenizer.encode(text)
        if len(encoded) == length:
            break
        tokens = encoded[:length] + source.ids(length - len(encoded))
    return DatasetPrompt(text, len(encoded), output_len)


def _custom(lines: Sequence[Any], output_len: int, generator: random.Random) -> list[DatasetPrompt]:
    texts = [line["prompt"] for line in lines if isinstance(line, dict) and isinstance(line.get("prompt"), str)]
    generator.shuffle(texts)
    return [DatasetPrompt(text, 0, output_len) for text in texts if text]


def _sharegpt(
    conversations: Sequence[Any], tokenizer: Tokenizer, output_len: int | None, count: int, generator: random.Random
) -> list[DatasetPrompt]:
    """Return up to `count` prompts: the first turn of a conversation, and the length of the second."""
    turns = [c["conversations"] for c in conversations if isinstance(c, dict) and len(c.get("conversations", [])) > 1]
    generator.shuffle(turns)
    prompts: list[DatasetPrompt] = []
    for question, answer in ((t[0]["value"], t[1]["value"]) for t in turns):
        prompt_len, answer_len = len(tokenizer.encode(question)), len(tokenizer.encode(answer))
        max_tokens = output_len or answer_len
        long_enough = prompt_len >= MIN_TOKENS and (output_len is not None or answer_len >= MIN_TOKENS)
        if long_enough and prompt_len <= MAX_PROMPT_TOKENS and prompt_len + max_tokens <= MAX_TOKENS:
            prompts.append(DatasetPrompt(question, prompt_len, max_tokens))
        if len(prompts) == count:
            break
    return prompts


def _read(path: Path, *, as_lines: bool) -> list[Any]:
    """Return the entries of a JSON list, or of a file with one JSON value in each line."""
    try:
        text = path.read_text()
        entries = [json.loads(line) for line in text.split("\n") if line.strip()] if as_lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dataset-path {path}: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"--dataset-path {path} is no list of conversations; it holds a {type(entries).__name__}")
    return entries
