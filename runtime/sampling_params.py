"""The parameters of sampling and stopping, under vLLM's names, and the checks of their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from reprlib import repr as shortened
from typing import Any

import msgspec

from .structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOPS_BY_DEFAULT = 4  # default of --max-stop-strings, as in OpenAI's API
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS, MAX_BAD_WORD_CHARS = 128, 4096  # words, and characters of all of them: they are tokenized at once
# Below this temperature sampling is greedy, as in vLLM (_SAMPLING_EPS). Divided by it, logits up to 3e33 are finite in
# float32 (3e27 after a repetition penalty), and a token whose logit is less by 0.001 is e^100 times less likely.
MIN_TEMPERATURE = 1e-5
MAX_REPETITION_PENALTY = 1_000_000
TOKEN_ID_LISTS = "allowed_token_ids", "logprob_token_ids"
MAX_INTEGER = 2**31 - 1  # numbers of tokens and ids are 32 bits wide in messages and kernels


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Rules for sampling tokens and for stopping; the names and defaults are vLLM's.

    Raises ValueError naming the parameter, its value and the rule. `seed` fixes the tokens of a request: they depend
    on (seed, position) only, not on the batch, a preemption or the TP size. The default is a random seed.
    With n > 1, output i uses seed + i: its tokens equal those of a request with that seed.

    allowed_token_ids  no other tokens are sampled
    bad_words          texts that an output does not have: the token that would complete one is not sampled, unless no
                       other token may come. Each word is tokenized alone, and after a space
    logprob_token_ids  tokens whose log-probabilities are reported in place of those of the likeliest tokens
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._integer("n", 1, MAX_N)
        self._number("temperature", 0, 2)
        self._number("top_p", 0, 1)
        _require(self.top_p > 0, "top_p", self.top_p, "must be in (0, 1]; 1 keeps every token")
        self._integer("top_k", -1)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        self._integer("min_tokens", 0)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1)
            rule = f"must be at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, rule)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, MAX_LOGPROBS)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**63 - 1)
        self._check_bias()
        self._check_bad_words()
        self._check_token_ids()
        self._check_stops()
        if self.structured_outputs is not None:
            structured = StructuredOutputsParams.from_value(self.structured_outputs)
            msgspec.structs.force_setattr(self, "structured_outputs", structured)
        if self.structured_outputs is not None and self.ignore_eos:
            raise ValueError("ignore_eos=True does not go with structured_outputs, which end with the EOS token")
        if self.structured_outputs is not None and self.allowed_token_ids is not None:
            raise ValueError("allowed_token_ids=... does not go with structured_outputs; give one of them")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def has_logprobs(self) -> bool:
        return self.logprobs is not None or self.logprob_token_ids is not None

    def of_further_output(self, seed: int) -> SamplingParams:
        """Return the parameters of another output of a prompt, of which one is enough for its log-probabilities."""
        params = copy(self)  # without another check of all values
        msgspec.structs.force_setattr(params, "seed", seed)
        msgspec.structs.force_setattr(params, "prompt_logprobs", None)
        return params

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a token id in these parameters is not one of the model's."""
        for name in ("stop_token_ids", "logit_bias", *TOKEN_ID_LISTS):
            ids = getattr(self, name)
            wrong = [i for i in (min(ids), max(ids)) if not 0 <= i < vocab_size] if ids else []
            rule = f"is not a token id; the model has ids 0 to {vocab_size - 1}"
            _require(not wrong, name, wrong[0] if wrong else None, rule)

    def _integer(self, name: str, low: int, high: int = MAX_INTEGER) -> None:
        value = getattr(self, name)
        _require(_is_integer(value), name, value, "must be an integer")
        _require(low <= value <= high, name, value, _range(low, high))

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, value, "must be a number")
        _require(low <= value <= high, name, value, f"{_range(low, high)} and finite")  # false for NaN, too

    def _check_bias(self) -> None:
        _require(isinstance(self.logit_bias, dict), "logit_bias", self.logit_bias, "must map token ids to numbers")
        biases = self.logit_bias.values()
        is_valid = _are(int, self.logit_bias) and _are(float, biases) and not math.isnan(sum(biases))
        is_valid = is_valid and max(map(abs, biases), default=0) <= 100
        for token, bias in () if is_valid else self.logit_bias.items():
            _require(isinstance(token, int), "logit_bias", token, "must have integer token ids as keys")
            number = isinstance(bias, (int, float)) and abs(bias) <= 100
            _require(number, f"logit_bias[{token}]", bias, "must be between -100 and 100")

    def _check_bad_words(self) -> None:
        words = self.bad_words or []
        is_valid = isinstance(words, list) and _are(str, words) and all(word.strip() for word in words)
        _require(is_valid, "bad_words", words, "must be a list of texts that are not blank")
        _require(len(words) <= MAX_BAD_WORDS, "bad_words", len(words), f"words are too many; at most {MAX_BAD_WORDS}")
        length, rule = sum(map(len, words)), f"characters are too many; at most {MAX_BAD_WORD_CHARS}"
        _require(length <= MAX_BAD_WORD_CHARS, "bad_words", length, rule)

    def _check_token_ids(self) -> None:
        for name in TOKEN_ID_LISTS:
            ids = getattr(self, name)
            if ids is not None:
                _require(isinstance(ids, list) and bool(ids), name, ids, "must be a list of at least one token id")
                _require_integers(name, ids)
        if self.logprob_token_ids is not None:
            count, name = len(self.logprob_token_ids), "logprob_token_ids"
            _require(count <= MAX_LOGPROB_TOKEN_IDS, name, count, f"ids are too many; at most {MAX_LOGPROB_TOKEN_IDS}")
            _require(self.logprobs in (None, count), name, count, f"ids do not go with logprobs={self.logprobs}")

    def _check_stops(self) -> None:
        is_valid = self.stop is None or isinstance(self.stop, (str, list))
        _require(is_valid, "stop", self.stop, "must be a string or a list")
        count = len(self.stop_strings)
        _require(count <= MAX_STOP_STRINGS, "stop", count, f"strings are too many; at most {MAX_STOP_STRINGS}")
        for s in self.stop_strings:
            _require(isinstance(s, str) and s != "", "stop", s, "must be a non-empty string")
        _require_integers("stop_token_ids", self.stop_token_ids)


def _are(kind: type, values: Iterable[Any]) -> bool:
    """Return whether all values are of exactly this type: fast, for parameters with a thousand entries."""
    return set(map(type, values)) <= {kind}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _range(low: float, high: float) -> str:
    return f"must be at least {low} and at most {high}" if high == MAX_INTEGER else f"must be between {low} and {high}"


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={shortened(value)} {rule}")


def _require_integers(name: str, values: Sequence[Any]) -> None:
    for value in () if _are(int, values) else values:
        _require(_is_integer(value), name, value, "must be integers")
