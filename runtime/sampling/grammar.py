"""Schemas, regexes, choices and grammars as llguidance matchers, which compute the tokens that may come next.

The work of a matcher is limited twice: by counts of operations, and by time (grammar_budget.py). A server tries its
clients' grammars in a process of this module (`python -m`), which answers each with a line of JSON and may be killed
at any time.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import llguidance
import msgspec
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from ..model.tokenizer_files import tokenizer_of_size
from ..structured_outputs import StructuredOutputsParams
from .gbnf import is_gbnf, to_lark
from .grammar_budget import GrammarCost, MaskBudget
from .neutral_rules import without_neutral_rules

# Two blanks, or a new line with its indentation: without a limit a confused model writes blanks for ever.
WHITESPACE = r"([ \t]{1,2}|\n[ \t]{0,64})"
# The lexer's initial fuel also bounds the time of a mask. That of (a{1000}){1000} over 128k tokens takes 25 ms at this
# limit, and 1.7 s at llguidance's default of a million. An enum of 3,000 strings needs more than 30,000. A state of the
# lexer takes 1 to 2 kB.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=50_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False
)
MAX_REASON = 300  # characters
# llguidance recurses over the rules of a grammar, and overflows the stack of its thread. Ranks compile what has passed
# the check in threads of at least 2 MiB, which is glibc's default under `ulimit -s unlimited`.
CHECK_STACK_BYTES = 2**20
TRIED_TOKENS = 16  # a grammar is tried with this many tokens before it is accepted
NO_EXTENSION = "no token of this model's vocabulary can come next"


class GrammarError(ValueError):
    """A grammar that cannot be used; the message begins with `structured_outputs=`."""


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, for grammars: its tokenizer.json in `folder`, and the facts of its config."""

    folder: Path
    size: int  # number of logits, which may exceed the number of tokens
    eos_token_ids: tuple[int, ...]

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Return the compiled grammar, at once if it has been compiled before; raises GrammarError."""
        compiled = _compiled(self, params.kind, params.text, params.disable_any_whitespace)
        if isinstance(compiled, str):
            raise GrammarError(compiled)
        return compiled


class CompiledGrammar:
    """A compiled grammar; its matchers share the states of one lexer, which remain when their requests have ended."""

    def __init__(self, vocabulary: Vocabulary, kind: str, text: str, compact: bool) -> None:
        self.cost = GrammarCost()
        self._tokenizer = load_tokenizer(vocabulary)
        try:
            self._grammar = to_llguidance(kind, text, compact)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise GrammarError(f"structured_outputs={kind} cannot be used: {_describe(error)}") from error
        self._pristine = self._compile()
        warnings = "; ".join(self._pristine.get_grammar_warnings())  # parts of the grammar that would be ignored
        if self._pristine.is_error() or warnings:
            reason = failure_reason(self._pristine) if self._pristine.is_error() else _one_line(warnings)
            raise GrammarError(f"structured_outputs={kind} cannot be used: {reason}")

    def matcher(self) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of an output."""
        return self._pristine.deep_copy()

    def renew(self) -> None:
        """Give later matchers a new lexer. The old one is full: of the states of many requests, or of one too large."""
        self._pristine = self._compile()

    def _compile(self) -> llguidance.LLMatcher:
        """Return a matcher that is never advanced, with a lexer that has computed the first mask."""
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar, limits=LIMITS, log_level=0)
        matcher.deep_copy().compute_bitmask()
        return matcher


@lru_cache(maxsize=2)
def load_tokenizer(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """Load the tokens as bytes, 1 s for 128k of them; raises GrammarError if that is not possible."""
    path = vocabulary.folder / "tokenizer.json"
    if not path.is_file():
        raise GrammarError("structured_outputs=... needs a tokenizer.json in the model's folder, which has none")
    if not vocabulary.eos_token_ids:
        raise GrammarError("structured_outputs=... needs a model with an end-of-sequence token to end the output")
    try:
        tokenizer = tokenizer_of_size(path, vocabulary.size)
        return llguidance.LLTokenizer(tokenizer, n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_token_ids))
    except ValueError as error:
        reason = _one_line(str(error).replace(str(path), path.name))
        raise GrammarError(f"structured_outputs=... cannot use the model's tokenizer.json: {reason}") from error


@lru_cache(maxsize=32)
def _compiled(vocabulary: Vocabulary, kind: str, text: str, compact: bool) -> CompiledGrammar | str:
    """Return the compiled grammar, or the error, which is also found once."""
    try:
        return CompiledGrammar(vocabulary, kind, text, compact)
    except GrammarError as error:
        return str(error)


def to_llguidance(kind: str, text: str, compact: bool) -> str:
    """Return a constraint as llguidance's JSON list of grammars; raises ValueError or LookupError for a wrong one."""
    if kind == "llguidance":
        return text
    if kind in ("json", "json_object"):
        schema = without_neutral_rules(json.loads(text))
        if not isinstance(schema, dict):
            raise ValueError("the JSON schema must be an object")
        blanks = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=blanks)  # type: ignore[arg-type]
    if kind == "regex":
        if (len(text) - len(text.rstrip("\\"))) % 2:  # llguidance leaves it out
            raise ValueError("the regex ends with a backslash that escapes nothing")
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":  # one terminal: thousands of alternatives in a rule exceed a limit of the parser
        literals = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(literals))
    return llguidance.LLMatcher.grammar_from_lark(to_lark(text) if is_gbnf(text) else text)


def try_out(vocabulary: Vocabulary, params: StructuredOutputsParams) -> None:
    """Compile a grammar and try it with random tokens that it allows; raises GrammarError for errors and slowness."""
    _try_tokens(vocabulary.compile(params), vocabulary.size, params.kind)


def _try_tokens(compiled: CompiledGrammar, vocab_size: int, kind: str) -> None:
    matcher, budget, rng = compiled.matcher(), MaskBudget(), random.Random(0)
    mask = allocate_token_bitmask(1, vocab_size)
    for number in range(TRIED_TOKENS):
        budget.begin_step()
        started = time.thread_time()
        fill_next_token_bitmask(matcher, mask)
        budget.add_mask(compiled.cost, time.thread_time() - started)
        budget.enforce([compiled.cost])
        if compiled.cost.is_banned:
            raise GrammarError(f"structured_outputs={kind} cannot be used: {compiled.cost.verdict}")
        if matcher.is_error():
            reason = failure_reason(matcher)
            if number == 0 or reason != NO_EXTENSION:  # the model may choose tokens that do not lead to a dead end
                raise GrammarError(f"structured_outputs={kind} cannot be used: {reason}")
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")[:vocab_size])
        if matcher.is_stopped() or not len(allowed) or not matcher.consume_token(int(rng.choice(allowed))):
            return


def failure_reason(matcher: llguidance.LLMatcher) -> str:
    """Return, in one line, why a matcher stopped: the limit, or that no token can come next."""
    error = matcher.get_error()
    if not error or error.startswith("NoExtension"):
        return NO_EXTENSION
    return _one_line(error)


def _describe(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _one_line(str(error)) or type(error).__name__


def _one_line(reason: str) -> str:
    """Return a reason as one line; a long one starts at its error, which follows the pattern."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    if len(line) > MAX_REASON:
        line = line[max(0, line.rfind("error: ")) :]
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 3] + "..."


def _problem(vocabulary: Vocabulary, line: bytes) -> str | None:
    """Return why a grammar cannot be used, or None; nothing is cached, because this process has little memory."""
    params = msgspec.json.decode(line, type=StructuredOutputsParams)
    try:
        compiled = CompiledGrammar(vocabulary, params.kind, params.text, params.disable_any_whitespace)
        _try_tokens(compiled, vocabulary.size, params.kind)
    except GrammarError as error:
        return str(error)
    return None


def main() -> None:
    """Answer each line of StructuredOutputsParams on stdin with null or the error. Arguments: folder, size, EOS ids."""
    folder, size, *eos = sys.argv[1:]
    vocabulary = Vocabulary(Path(folder), int(size), tuple(map(int, eos)))
    answer: str | None = None
    try:
        load_tokenizer(vocabulary)
    except GrammarError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)  # ready
    threading.stack_size(CHECK_STACK_BYTES)
    with ThreadPoolExecutor(1) as thread:
        for line in sys.stdin.buffer:
            print(json.dumps(thread.submit(_problem, vocabulary, line).result()), flush=True)


if __name__ == "__main__":
    main()
