"""Schemas, regexes, choices and grammars as llguidance matchers, which compute the tokens that may come next.

The cost of a matcher is limited by counts of operations, not by time: all ranks then refuse the same grammars at the
same token, on busy hosts too. A server tries its clients' grammars in a process of this module (`python -m`), which
answers each with a line of JSON and may be killed at any time.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import llguidance
import msgspec
from llguidance import gbnf_to_lark

from ..structured_outputs import StructuredOutputsParams

# Two blanks, or a new line with its indentation: without a limit a confused model writes blanks for ever.
WHITESPACE = r"([ \t]{1,2}|\n[ \t]{0,64})"
# The lexer's initial fuel also bounds the time of a mask. That of (a{1000}){1000} over 128k tokens takes 25 ms at this
# limit, and 1.7 s at llguidance's default of a million. An enum of 3,000 strings needs more than 30,000.
LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=50_000, verbose_errors=False)
MAX_REASON = 300  # characters


class GrammarError(ValueError):
    """A grammar that cannot be used; the message begins with `structured_outputs=`."""


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, for grammars: its tokenizer.json in `folder`, and the facts of its config."""

    folder: Path
    size: int  # number of logits, which may exceed the number of tokens
    eos_token_ids: tuple[int, ...]

    def matcher(self, params: StructuredOutputsParams) -> llguidance.LLMatcher:
        """Return a matcher at the beginning of an output; raises GrammarError."""
        return _compile(self, params.kind, params.text, params.disable_any_whitespace).deep_copy()


@lru_cache(maxsize=2)
def load_tokenizer(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """Load the tokens as bytes, 1 s for 128k of them; raises GrammarError if that is not possible."""
    path = vocabulary.folder / "tokenizer.json"
    if not path.is_file():
        raise GrammarError(f"structured_outputs=... needs the tokenizer in {path}, which is not there")
    if not vocabulary.eos_token_ids:
        raise GrammarError("structured_outputs=... needs a model with an end-of-sequence token to end the output")
    try:
        return llguidance.LLTokenizer(str(path), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_token_ids))
    except ValueError as error:
        raise GrammarError(f"structured_outputs=... cannot use {path}: {_one_line(str(error))}") from error


@lru_cache(maxsize=64)
def _compile(vocabulary: Vocabulary, kind: str, text: str, compact: bool) -> llguidance.LLMatcher:
    """Return a matcher to copy, which is never advanced: each request starts from the same state, at the same cost."""
    try:
        grammar = _to_llguidance(kind, text, compact)
    except (ValueError, LookupError, RecursionError, gbnf_to_lark.GbnfToLarkError) as error:
        raise GrammarError(f"structured_outputs={kind} cannot be used: {_one_line(str(error))}") from error
    matcher = llguidance.LLMatcher(load_tokenizer(vocabulary), grammar, limits=LIMITS, log_level=0)
    warnings = "; ".join(matcher.get_grammar_warnings())  # parts of the grammar that would be ignored
    if matcher.is_error() or warnings:
        reason = failure_reason(matcher) if matcher.is_error() else _one_line(warnings)
        raise GrammarError(f"structured_outputs={kind} cannot be used: {reason}")
    return matcher


def _to_llguidance(kind: str, text: str, compact: bool) -> str:
    if kind in ("json", "json_object"):
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise ValueError("the JSON schema must be an object")
        blanks = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITESPACE}
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=blanks)  # type: ignore[arg-type]
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        literals = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(literals))
    return llguidance.LLMatcher.grammar_from_lark(gbnf_to_lark.any_to_lark(text))


def try_out(vocabulary: Vocabulary, params: StructuredOutputsParams) -> None:
    """Compile a grammar and compute its first mask, as a rank would; raises GrammarError."""
    matcher = vocabulary.matcher(params)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(f"structured_outputs={params.kind} cannot be used: {failure_reason(matcher)}")


def failure_reason(matcher: llguidance.LLMatcher) -> str:
    """Return, in one line, why a matcher stopped: the limit, or that no token can come next."""
    error = matcher.get_error()
    if not error or error.startswith("NoExtension"):
        return "no token of this model's vocabulary can come next"
    return _one_line(error)


def _one_line(reason: str) -> str:
    """Return a reason as one line; a long one starts at its error, which follows the pattern."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    if len(line) > MAX_REASON:
        line = line[max(0, line.rfind("error: ")) :]
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 3] + "..."


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
    for line in sys.stdin.buffer:
        try:
            try_out(vocabulary, msgspec.json.decode(line, type=StructuredOutputsParams))
            answer = None
        except GrammarError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
