"""Patterns of markers as grammars: they accept the texts that Python's regexes match."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import llguidance
import pytest

from lockstep.runtime.chat.marker_grammar import MarkerGrammar, regex_of
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.sampling.grammar import Vocabulary, load_tokenizer

PATTERNS = [
    "ab", "a|b", "a?b", "(?:ab)*c", "a{1,2}[bc]", "[^a]b", "a.c", r"\s*a", r"a\s+b", r"(?P<x>a|bc)d", r"\w\W?", "a*?b",
    r"\[(?:a|b)\]", "(?:abc|abd|a)c?",
]  # fmt: skip
TEXTS = ["".join(text) for length in range(4) for text in itertools.product("abcd []\n", repeat=length)]
TOKENIZER = load_tokenizer(Vocabulary(Path(DEMO_MODEL), 2048, (1,)))


def compiled(lark: str) -> llguidance.LLMatcher:
    matcher = llguidance.LLMatcher(TOKENIZER, llguidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), (lark, matcher.get_error())
    return matcher


def accepts(grammar: llguidance.LLMatcher, tokens: list[int]) -> bool:
    matcher = grammar.deep_copy()
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_grammar_accepts_what_the_pattern_matches(pattern: str) -> None:
    sequence = compiled(f"start: {' '.join(MarkerGrammar({}).pattern(pattern, {}))}")
    regex = compiled(f"start: A\nA: /{regex_of(pattern)}/")
    matches = re.compile(pattern, re.DOTALL).fullmatch
    matching = [text for text in TEXTS if text and matches(text)]
    others = [text for text in TEXTS if text and not matches(text)]
    for text, is_match in [*((text, True) for text in matching[:40]), *((text, False) for text in others[::7])]:
        tokens = TOKENIZER.tokenize_str(text)
        has_long_blanks = r"\s" in pattern and re.search(r"\s{3}", text)  # bounded, unlike in the pattern
        assert accepts(sequence, tokens) == (is_match and not has_long_blanks), text
        assert accepts(regex, tokens) == is_match, text


def test_groups_have_their_text() -> None:
    markers = MarkerGrammar({})
    assert markers.pattern(r"<f=(?P<name>[^>]+)>", {"name": "a.b"}) == ['"<f="', '"a.b"', '">"']
    assert markers.pattern(r"<f=(?P<name>[^>]+)>", {}, {"name": "NAME"}) == ['"<f="', "NAME", '">"']
    with pytest.raises(ValueError, match="the name 'a>' does not match"):
        markers.pattern(r"<f=(?P<name>[^>]+)>", {"name": "a>"})


def test_special_tokens_are_tokens_in_texts_and_alternatives() -> None:
    markers = MarkerGrammar({"<|a|>": 5, "<|ab|>": 6})
    assert markers.text("<|ab|>call:<|a|>") == ["<[6]>", '"call:"', "<[5]>"]
    assert markers.pattern(r"(?:<\|a\|>|<\|ab\|>|<b>)x", {}) == ['(<[5]> | <[6]> | "<b>")', '"x"']


@pytest.mark.parametrize(("pattern", "construct"), [("(?=a)", "ASSERT"), (r"(a)\1", "GROUPREF"), ("a$", "AT")])
def test_what_no_grammar_can_express_is_refused(pattern: str, construct: str) -> None:
    with pytest.raises(ValueError, match=f"its pattern has {construct}"):
        MarkerGrammar({}).pattern(pattern, {})
