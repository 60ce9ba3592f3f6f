"""Schemas, regexes, choices and grammars as llguidance's matchers: which tokens may come next.

What a matcher may cost is limited by counts of work, not by time: all ranks then refuse the same grammars at the same
token, whatever else their hosts do. `python -m` this module is the process in which a server tries what its clients
send: it answers a line of JSON for each, and may be killed at any time.
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

# Two blanks, or a new line with its indentation: a model that has lost its way would otherwise write blanks for ever.
WHITESPACE = r"([ \t]{1,2}|\n[ \t]{0,64})"
# The lexer's work to begin with also bounds a mask: that of (a{1000}){1000} over 128k tokens takes 25 ms at this limit
# and 1.7 s at llguidance's own of a million. An enum of 3,000 strings needs more than 30,000.
LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=50_000, verbose_errors=False)
LONGEST_REASON = 300  # characters


class GrammarError(ValueError):
    """A grammar that cannot be used; the message begins with `structured_outputs=`."""


@dataclass(frozen=True)
class Vocabulary:
    """Where a model's tokens are written down: tokenizer.json in `folder`, and what its config says of them."""

    folder: Path
    size: int  # of the logits, which may be more than there are tokens
    eos_token_ids: tuple[int, ...]

    def matcher(self, params: StructuredOutputsParams) -> llguidance.LLMatcher:
        """At the beginning of an output; raises GrammarError."""
        return _compiled(self, params.kind, params.text, params.disable_any_whitespace).deep_copy()


@lru_cache(maxsize=2)
def load_tokens(vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """The tokens as bytes, 1 s for 128k of them; raises GrammarError where they cannot be had."""
    path = vocabulary.folder / "tokenizer.json"
    if not path.is_file():
        raise GrammarError(f"structured_outputs=... needs the tokenizer in {path}, which is not there")
    if not vocabulary.eos_token_ids:
        raise GrammarError("structured_outputs=... needs a model with an end-of-sequence token to end the output")
    try:
        return llguidance.LLTokenizer(str(path), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_token_ids))
    except ValueError as error:
        raise GrammarError(f"structured_outputs=... cannot use {path}: {_short(str(error))}") from error


@lru_cache(maxsize=64)
def _compiled(vocabulary: Vocabulary, kind: str, text: str, compact: bool) -> llguidance.LLMatcher:
    """A matcher that is copied and never moved: each request starts from the same state, with the same work to do."""
    try:
        grammar = _in_llguidance(kind, text, compact)
    except (ValueError, LookupError, RecursionError, gbnf_to_lark.GbnfToLarkError) as error:
        raise GrammarError(f"structured_outputs={kind} cannot be used: {_short(str(error))}") from error
    matcher = llguidance.LLMatcher(load_tokens(vocabulary), grammar, limits=LIMITS, log_level=0)
    warnings = "; ".join(matcher.get_grammar_warnings())  # that something is ignored
    if matcher.is_error() or warnings:
        trouble = why_not(matcher) if matcher.is_error() else _short(warnings)
        raise GrammarError(f"structured_outputs={kind} cannot be used: {trouble}")
    return matcher


def _in_llguidance(kind: str, text: str, compact: bool) -> str:
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
    """Compile and take the first step, as a rank would; raises GrammarError."""
    matcher = vocabulary.matcher(params)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise GrammarError(f"structured_outputs={params.kind} cannot be used: {why_not(matcher)}")


def why_not(matcher: llguidance.LLMatcher) -> str:
    """What stops a matcher, in one line: which limit it was, or that nothing can come next."""
    error = matcher.get_error()
    if not error or error.startswith("NoExtension"):
        return "no token of this model's vocabulary can come next"
    return _short(error)


def _short(reason: str) -> str:
    """In one line; what a long one has to say comes after the pattern."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    if len(line) > LONGEST_REASON:
        line = line[max(0, line.rfind("error: ")) :]
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."


def main() -> None:
    """Arguments: folder, size, EOS ids. A line of StructuredOutputsParams in, a line with null or the error out."""
    folder, size, *eos = sys.argv[1:]
    vocabulary = Vocabulary(Path(folder), int(size), tuple(map(int, eos)))
    answer: str | None = None
    try:
        load_tokens(vocabulary)
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
