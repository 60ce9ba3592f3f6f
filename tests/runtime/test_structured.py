"""Constrained outputs against brute force: transformers' logits, with every token tried against the pattern.

The vocabulary is ASCII in one and two characters, made so that most texts can be spelled in several ways. `regex`
says by partial matching whether a text may still become a match: it shares nothing with llguidance.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import torch
from tokenizers import Tokenizer

from lockstep import LLM, SamplingParams, StructuredOutputsParams
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.engine import Engine
from lockstep.runtime.request import Request
from lockstep.runtime.sampling.gbnf import is_gbnf, to_lark
from lockstep.runtime.sampling.grammar import CompiledGrammar, GrammarError, Vocabulary, try_out
from lockstep.runtime.sampling.grammar_state import mask_tokens_
from lockstep.runtime.sampling.neutral_rules import without_neutral_rules

from checkpoints import ASCII_TEXTS as TEXTS
from checkpoints import ascii_checkpoint
from engines import Results, request, run_engine

EOS = 2
# Its own pattern, with what `regex` wants; outputs of a random model would rarely end without an upper end.
PATTERN = r"[ab]{2,6}(, ?(c|1{2,4}|[x-z]+!)){1,3}"
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": -5, "maximum": 120},
        "b": {"type": "array", "items": {"enum": ["c", "ab", None, True]}, "minItems": 1, "maxItems": 3},
        "c": {"type": "string", "pattern": "^[ab]{1,4}$"},
        "1": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"],
              "additionalProperties": False}]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}  # fmt: skip
CHOICES = ["a", "ab", 'b"1\\', "cab, {}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_checkpoint(tmp_path_factory.mktemp("structured"))


def constrained(
    uid: int, prompt: list[int], *, max_tokens: int = 90, stop_ids: tuple[int, ...] = (EOS,), **options: Any
) -> Request:
    kinds = ("json", "regex", "choice", "grammar", "json_object", "disable_any_whitespace")
    structured = StructuredOutputsParams(**{k: v for k, v in options.items() if k in kinds})
    rest = {k: v for k, v in options.items() if k not in kinds}
    return request(uid, prompt, stop_ids, max_tokens=max_tokens, structured_outputs=structured, **rest)


def prompts(number: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(3, 131, int(n)).tolist() for n in rng.integers(1, 40, number)]


def text_of(tokens: list[int]) -> str:
    return "".join(TEXTS[t] for t in tokens if t != EOS)


def by_brute_force(folder: Path, prompt: list[int], pattern: str, n: int, steps: list[int] | None = None) -> list[int]:
    """Greedy with transformers: at each step the likeliest token after which the text may still become a match."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    produced: list[int] = []
    with torch.inference_mode():
        while len(produced) < n:
            logits = model(torch.tensor([prompt + produced])).logits[0, -1]
            text = text_of(produced)
            may = [bool(regex.fullmatch(pattern, text + t, partial=True)) for t in TEXTS]
            may[:3] = [False, False, regex.fullmatch(pattern, text) is not None]
            produced.append(int(logits.masked_fill(~torch.tensor(may), -torch.inf).argmax()))
            if steps is not None:
                steps.append(sum(may))
            if produced[-1] == EOS:
                break
    return produced


@pytest.mark.parametrize("pattern", [PATTERN, r"(a|ab|abc)+1{0,2}[^b-z]", r"[^a-c]{5}|c{3,}\d\d"])
def test_grammar_greedy_tokens_match_masked_transformers(folder: Path, pattern: str) -> None:
    options = prompts(4)
    actual = run_engine(folder, [constrained(i, p, regex=pattern, max_tokens=24) for i, p in enumerate(options)])
    allowed: list[int] = []
    for i, prompt in enumerate(options):
        assert actual.tokens[i] == by_brute_force(folder, prompt, pattern, 24, allowed)
    assert min(allowed) < 5 or max(allowed) > 20, "the pattern leaves nothing to choose"


def test_grammar_choice_is_the_most_likely(folder: Path) -> None:
    pattern = "|".join(map(re.escape, ["a", "ab", "b, c", "1 1"]))
    for i, prompt in enumerate(prompts(4)):
        (actual,) = run_engine(folder, [constrained(i, prompt, choice=["a", "ab", "b, c", "1 1"])]).tokens.values()
        assert actual == by_brute_force(folder, prompt, pattern, 90)


def kinds() -> list[Request]:
    """Four kinds of structure with all kinds of sampling, and between them requests that are free."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 1.0}, {"temperature": 0}, {"temperature": 1.3, "top_k": 8},
        {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
        {"temperature": 1.0, "logit_bias": {40: 5.0}, "min_tokens": 12, "logprobs": 2},
    ]  # fmt: skip
    structures: list[dict[str, Any]] = [
        {"json": SCHEMA}, {"regex": PATTERN}, {"choice": CHOICES}, {"grammar": 'root ::= "a" ("b" | "1 ")+ "c"'},
    ]  # fmt: skip
    options = prompts(24)
    actual = [constrained(i, p, **sampling[i % 5], **structures[i % 4]) for i, p in enumerate(options[:20])]
    return actual + [request(20 + i, p, [EOS], max_tokens=30, **sampling[i]) for i, p in enumerate(options[20:])]


@pytest.fixture(scope="module")
def baseline(folder: Path) -> Results:
    return run_engine(folder, kinds(), max_model_len=160)


def test_grammar_output_matches_when_finished(baseline: Results) -> None:
    checks: list[Callable[[str], object]] = [
        lambda text: jsonschema.validate(json.loads(text), SCHEMA),
        lambda text: re.fullmatch(PATTERN, text) or pytest.fail(text),
        lambda text: text in CHOICES or pytest.fail(text),
        lambda text: re.fullmatch("a(b|1 )+c", text) or pytest.fail(text),
    ]
    ended = [0, 0, 0, 0]
    for uid in range(20):
        assert baseline.finished[uid].reason in ("stop", "length")
        if baseline.finished[uid].reason == "stop":
            assert baseline.tokens[uid][-1] == EOS
            checks[uid % 4](text_of(baseline.tokens[uid]))
            ended[uid % 4] += 1
    assert min(ended) >= 2, f"too few came to an end: {ended}"


def test_grammar_does_not_change_other_requests(folder: Path, baseline: Results) -> None:
    free = [r for r in kinds() if r.params.structured_outputs is None]
    alone = run_engine(folder, free, max_model_len=160)
    assert alone.tokens == {r.uid: baseline.tokens[r.uid] for r in free}


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "chunks of 7 tokens": {"max_num_batched_tokens": 7, "max_num_seqs": 7},
    "four at a time": {"max_num_seqs": 4},
    "no prefix cache": {"enable_prefix_caching": False},
    "results one step late": {"overlap": True},
    "two ranks": {"tp": 2},
    "two ranks, few pages, results one step late": {"tp": 2, "num_pages": 44, "overlap": True},
    "few pages": {"num_pages": 44},
}


@pytest.mark.parametrize("options", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_grammar_tokens_are_independent_of_batching(folder: Path, baseline: Results, options: dict[str, Any]) -> None:
    actual = run_engine(folder, kinds(), max_model_len=160, **options)
    assert actual.tokens == baseline.tokens
    assert actual.finished == baseline.finished
    if "num_pages" in options:
        assert actual.preemptions > 0, "meant to run out of pages"


@pytest.mark.gpu
def test_grammar_tokens_with_graphs_and_overlap_on_gpu(folder: Path, baseline: Results) -> None:
    """float32 on both sides: CUDA graphs sample inside, and constrained rows again outside of them."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_model_len": 160}
    graphs = run_engine(folder, kinds(), **options)
    assert run_engine(folder, kinds(), **options, enforce_eager=True).tokens == graphs.tokens
    assert run_engine(folder, kinds(), **options, overlap_scheduling=False).tokens == graphs.tokens
    free = [r for r in kinds() if r.params.structured_outputs is None]
    alone = run_engine(folder, free, **options)
    assert alone.tokens == {r.uid: graphs.tokens[r.uid] for r in free}
    for r in kinds():
        if r.params.temperature == 0:  # near ties of random draws may fall differently on the two devices
            assert graphs.tokens[r.uid] == baseline.tokens[r.uid]


def test_grammar_continues_after_readmission_at_any_token(folder: Path, baseline: Results) -> None:
    """A new engine continues from the tokens produced so far, as after the death of a rank."""
    for cut in (1, 3, 8):
        again = []
        for r in kinds():
            produced = baseline.tokens[r.uid][:cut]
            if len(produced) < len(baseline.tokens[r.uid]):
                tokens = np.concatenate((r.tokens, np.array(produced, np.int32)))
                again.append(Request(r.uid, tokens, r.num_prompt_tokens, r.params, r.stop_ids))
        assert len(again) > 6
        actual = run_engine(folder, again, max_model_len=160)
        assert actual.tokens == {r.uid: baseline.tokens[r.uid][cut:] for r in again}


def test_grammar_end_overrides_min_tokens(folder: Path) -> None:
    (prompt,) = prompts(1)
    options = [
        constrained(0, prompt, regex="a{2,9}", min_tokens=9, logit_bias={EOS: 100.0}),
        constrained(1, prompt, choice=["abc"], min_tokens=50),
    ]
    actual = run_engine(folder, options)
    assert text_of(actual.tokens[0]) == "a" * 9, "as long as it may, because it must have 9 tokens"
    assert text_of(actual.tokens[1]) == "abc"
    assert [actual.finished[uid].reason for uid in (0, 1)] == ["stop", "stop"]


def test_grammar_allows_stop_ids_where_it_may_end(folder: Path) -> None:
    (prompt,) = prompts(1)
    actual = run_engine(folder, [constrained(0, prompt, regex="[bc]{3}x*", stop_ids=(1, EOS), logit_bias={1: 100.0})])
    assert actual.tokens[0][-1] == 1
    assert re.fullmatch("[bc]{3}", text_of(actual.tokens[0][:-1]))


def test_grammar_without_continuation_ends_its_request_alone(folder: Path) -> None:
    """The vocabulary has no byte beyond ASCII: after the a's this pattern has no way on."""
    options = prompts(3)
    free = [request(1, options[1], [EOS], temperature=1), constrained(2, options[2], regex=PATTERN, temperature=1)]
    expected = run_engine(folder, free)
    for tp, overlap in ((1, False), (2, True)):
        actual = run_engine(folder, [constrained(0, options[0], regex="aa\u00e9"), *free], tp=tp, overlap=overlap)
        assert actual.finished[0].reason == "error"
        assert "no token of this model's vocabulary" in (actual.finished[0].error or "")
        assert {uid: actual.tokens[uid] for uid in (1, 2)} == expected.tokens


def test_invalid_grammar_is_refused_before_any_step(folder: Path) -> None:
    """The front end refuses it; should it arrive all the same, it ends alone."""
    (prompt,) = prompts(1)
    actual = run_engine(folder, [constrained(0, prompt, regex="("), request(1, prompt)])
    assert actual.finished[0].reason == "error"
    assert len(actual.tokens[1]) == 16


def test_grammar_request_cancelled_during_a_step(folder: Path, baseline: Results) -> None:
    """Slots change hands while tokens are on their way."""
    noise = [constrained(100 + i, p, regex="[a-c]{50}", temperature=1) for i, p in enumerate(prompts(20))]

    def between(step: int, engine: Engine) -> None:
        if step < 20:
            engine.add([noise[step]])
            engine.cancel([100 + step - 2])

    actual = run_engine(folder, kinds(), max_model_len=160, max_num_seqs=8, overlap=True, between=between)
    assert {uid: t for uid, t in actual.tokens.items() if uid < 100} == baseline.tokens


def test_mask_tokens_equals_bitmask() -> None:
    rng = np.random.default_rng(3)
    for vocab in (31, 32, 131):
        logits, rows = torch.randn(5, vocab), torch.tensor([3, 0])
        words = rng.integers(-(2**31), 2**31, (2, -(-vocab // 32)), dtype=np.int64).astype(np.int32)
        expected = logits.clone()
        for row, mask in zip(rows.tolist(), words, strict=True):
            for v in range(vocab):
                if not int(mask[v // 32]) >> v % 32 & 1:
                    expected[row, v] = -torch.inf
        mask_tokens_(logits, rows, torch.from_numpy(words))
        assert torch.equal(logits, expected)


HOSTILE = [
    {"regex": "(a{1000}){1000}"}, {"regex": "((a?){1000}){1000}"}, {"regex": "(" * 5000 + ")" * 5000},
    {"regex": "(.*a.{9}|.*b.{9})c"}, {"regex": "(a|aa|aaa){5000}"}, {"regex": r"(\w{1,500}\s?){1,500}"},
    {"json": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}},
    {"json": {"$ref": "#"}}, {"json": '{"a":' * 5000 + "1" + "}" * 5000}, {"choice": ["a" * 90_000]},
    {"grammar": "start: start start | start | \"a\""}, {"grammar": "start: x\nx: x"}, {"grammar": "root ::= " * 3000},
    {"json": {"type": "array", "items": {"type": "array", "maxItems": 10**6}, "maxItems": 10**6}},
]  # fmt: skip


@pytest.mark.parametrize("options", HOSTILE, ids=lambda a: str(a)[:40])
def test_hostile_grammars_are_refused_or_harmless(folder: Path, options: dict[str, Any]) -> None:
    """Nothing but a GrammarError, whatever comes; how long it takes is limited by counts, in a server by killing."""
    model = Vocabulary(folder, 131, (EOS,))
    refusal = None
    try:
        try_out(model, StructuredOutputsParams(**options))
    except GrammarError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("structured_outputs=")
        assert len(refusal) < 400
        assert "\n" not in refusal
    else:
        actual = run_engine(folder, [constrained(0, prompts(1)[0], **options, max_tokens=8), request(1, [5, 6])])
        assert len(actual.tokens[1]) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has nothing; give exactly one of"),
        ({"regex": "a", "choice": ["a"]}, "has regex and choice"),
        ({"choice": []}, "non-empty strings"),
        ({"choice": ["a", ""]}, "non-empty strings"),
        ({"regex": "a" * 100_001}, "100001 characters of regex; at most 100000"),
        ({"regex": "a", "disable_any_whitespace": True}, "it is for json and json_object"),
        ({"json": {"a": {1, 2}}}, "not JSON"),
    ],
)
def test_structured_outputs_params_refuse_invalid_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-ahead"),
        ({"regex": "a\\"}, "ends with a backslash"),
        ({"regex": "a\\\\\\"}, "ends with a backslash"),
        ({"regex": r"[^\s\S]"}, "structured_outputs=regex cannot be used"),
        ({"json": {"not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, r'Unimplemented keys: \["not"\]'),
        ({"json": "[1]"}, "must be an object"),
        ({"json": "{"}, "cannot be used"),
        ({"json": {"$ref": "https://example.com/schema"}}, "does not fetch"),
    ],
)
def test_unusable_grammars_are_refused_before_they_start(options: dict[str, Any], message: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**options))
    with LLM(device="cpu", num_pages=64) as llm, pytest.raises(ValueError, match=message):
        llm.generate("a", params, use_tqdm=False)


GBNF = {
    r'"\u0041BC\u4e2d\U0001f600"': ["ABC\u4e2d\U0001f600"],
    r'"\x41\x22\\u0041\[\u005d\u005c\u0022"': ['A"\\u0041[]\\"'],
    r"[\U00000041-\U0010ffff]": ["A", "\xe9", "\uffff", "\U0010ffff"],
    r"[^\u0000-\u001f\]\u005b-]": ["A", "^", "\\", "\U0001f600"],
    r"[a\-\[\]\\\"\n]": ["-", "[", "]", "\\", '"', "\n", "a"],
    r'"\"\\\n\r\t\-"': ['"\\\n\r\t-'],
    r"[a&&b~~+--/]": ["&", "~", "/", "a", "b", "+", ",", "-"],
    '"a\n/"': ["a\n/"],
}


@pytest.mark.parametrize("rule", GBNF)
def test_escapes_of_gbnf_are_code_points(rule: str) -> None:
    """Compared with Python's own escapes."""
    tokenizer = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    size, every = tokenizer.get_vocab_size(), ["@", "\n", "[", "]", "-", "\u41bc", *itertools.chain(*GBNF.values())]
    grammar = CompiledGrammar(Vocabulary(Path(DEMO_MODEL), size, (0,)), "grammar", f"root ::= {rule}", False)

    def is_accepted(text: str) -> bool:
        ids, matcher = tokenizer.encode(text, add_special_tokens=False).ids, grammar.matcher()
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    is_class = rule.startswith("[") and "&&" not in rule
    expected = [text for text in every if (is_class and re.fullmatch(rule, text)) or text in GBNF[rule]]
    assert [text for text in every if is_accepted(text)] == expected


JSON_GBNF = r"""
# JSON: \q \u12 "an open text [a class
root  ::= ws value   # the end \\
value ::= (
    object | array    # "
  | string | number |
    ( "true" | "false" | "null" ) ws
)
object ::= "{" ws ( member ( "," ws member )* )? "}" ws
member ::= string ":" ws value
array  ::= "[" ws ( value ("," ws value){0,} )? "]" ws
string ::= "\"" ( [^"\\\x00-\x1f] | "\\" ( ["\\/bfnrt] | "u" [0-9a-fA-F]{4} ) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [\-+]? [0-9]{1,3})? ws
ws ::= [ \t\n\r]{0,3} # \
"""
JSON_TEXTS = [
    "{}", ' {"a": [1, -2.5e-10, "\\u00e9\\n", {"b": null}], "c": "é\U0001f600"}', "[]", "[true,\n false]", "0", '"\\""',
    "{a: 1}", "[1,]", "01", '"\\x"', '"\n"', "[1", '{"a" 1}', "+1", "1.", "tru", '"\\u12"', "", "1 1",
]  # fmt: skip


def gbnf_accepts(rules: str, text: str) -> bool:
    tokenizer = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    vocabulary = Vocabulary(Path(DEMO_MODEL), tokenizer.get_vocab_size(), (0,))
    matcher = vocabulary.compile(StructuredOutputsParams(grammar=rules)).matcher()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_gbnf_of_json_is_json(end: str) -> None:
    rules = JSON_GBNF.replace("\n", end)
    assert [text for text in JSON_TEXTS if gbnf_accepts(rules, text)] == list(filter(is_json, JSON_TEXTS))


@pytest.mark.parametrize(
    ("rules", "accepted", "refused"),
    [
        ("root ::= .{2}", ["a\n", "é\u4e2d"], ["a", "abc"]),
        ('root ::= foo-bar foo_bar fooBar start 1st\nfoo-bar ::= "a"\nfoo_bar ::= "b"\nfooBar ::= "c"\n'
         'start ::= "d"\n1st ::= "e"', ["abcde"], ["abcd", "aacde"]),
        ('root ::= "a"{2} | "b"+ | "" "c" ( )', ["aa", "bb", "c"], ["", "a", "aaa", "cc"]),
        ('root ::=\n\n  "a" |\n "b"\n', ["a", "b"], ["ab"]),
        ("root ::= [\u4e2d\u00e9-\u00fc]+", ["\u4e2d\u00ea"], ["a"]),
        ("root ::= [+-]\n", ["+", "-"], ["\n", ","]),
    ],
)  # fmt: skip
def test_gbnf_takes_what_llama_cpp_takes(rules: str, accepted: list[str], refused: list[str]) -> None:
    assert [text for text in accepted + refused if gbnf_accepts(rules, text)] == accepted


GBNF_MISTAKES = {
    'root ::= "a\\': 'line 1, column 10: the text or class that begins with " does not end',
    "root ::= [a\\": "line 1, column 10: the text or class that begins with [ does not end",
    'root ::= "a': 'line 1, column 10: the text or class that begins with " does not end',
    '# \\\nroot ::= "\\q"': "line 2, column 11: the escape \\q is unknown",
    'root ::= "\\x4"': "line 1, column 11: the escape \\x is unknown or lacks digits",
    'root ::= "\\u004g"': "line 1, column 11: the escape \\u is unknown or lacks digits",
    "root ::= [\\U0001f60]": "line 1, column 11: the escape \\U is unknown or lacks digits",
    'root ::= "\\ud800"': "line 1, column 11: \\ud800 is no character",
    'root ::= "\\U00110000"': "line 1, column 11: \\U00110000 is no character",
    "root ::= [b-a]": "",
    "root ::= []": "",
    'root ::= ("a"\n': "Expected ')'",
    'root ::= "a" )': "Expected name",
    'root ::= "a"{2,1}': "",
    'root ::= "a"{,2}': "Expected integer",
    "root ::= *": "Expected name",
    'root ::= "a"{2}{2}': "Expected name",
    "root ::= <think>": "line 1, column 11: the rule 'think' is not defined",
    'root ::= a\na ::= "a" b c': "line 2, column 11: the rule 'b' is not defined",
    'root ::= "a"\nroot ::= "b"': "line 2, column 1: the rule 'root' is defined twice",
    'a ::= "a"': "No 'root' rule found",
    'root = "a"\na ::= "a"': "line 1, column 1: the rule 'root' is not defined",
    '\nroot ::= "a"\n| "b"': "Expected name",
}


@pytest.mark.parametrize("text", ["\n" * 90_000 + 'root ::= "a"', "root ::= " + "{" * 90_000])
def test_gbnf_is_read_in_linear_time(text: str) -> None:
    """Reading it again from each line or brace took 10 s."""
    started = time.thread_time()
    with suppress(ValueError):
        to_lark(text) if is_gbnf(text) else text
    assert time.thread_time() - started < 2.0


@pytest.mark.parametrize("rules", GBNF_MISTAKES)
def test_mistakes_in_gbnf_are_refused(rules: str) -> None:
    params = StructuredOutputsParams(grammar=rules)
    with pytest.raises(GrammarError) as caught:
        Vocabulary(Path(DEMO_MODEL), 2048, (0,)).compile(params)
    assert str(caught.value).startswith(f"structured_outputs=grammar cannot be used: {GBNF_MISTAKES[rules]}")


def test_demo_model_follows_the_schema_with_any_seed() -> None:
    """A real tokenizer, with bytes that are no character by themselves."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30}, "day": {"type": "string", "format": "date"},
            "n": {"type": "number", "minimum": 0, "maximum": 1000},
        },
        "required": ["name", "day", "n"], "additionalProperties": False,
    }  # fmt: skip
    structured = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    params = SamplingParams(n=32, seed=1, temperature=1.5, max_tokens=150, structured_outputs=structured)
    with LLM(device="cpu", num_pages=1024) as llm:
        (result,) = llm.generate(["And the name of the king was"], params, use_tqdm=False)
    ended = [o for o in result.outputs if o.finish_reason == "stop"]
    assert len(ended) > 20
    for output in ended:
        jsonschema.validate(json.loads(output.text), schema, format_checker=jsonschema.FormatChecker())
    assert len({o.text for o in ended}) > 20


STRING = {"type": "string"}
NEUTRAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"type": "object", "propertyNames": STRING, "additionalProperties": STRING}, {"a": "b"}),
    ({"properties": {"a": {"type": "array", "items": STRING, "uniqueItems": False}}}, {"a": ["b", "b"]}),
    ({"properties": {"a": STRING | {"format": "password"}}, "dependentRequired": {}}, {"a": "b"}),
    ({"$defs": {"format": {"type": "object", "properties": {"format": STRING | {"format": "file-path"}}}},
      "$ref": "#/$defs/format"}, {"format": "b"}),
    ({"properties": {"propertyNames": STRING, "uniqueItems": {"const": False}}}, {"propertyNames": "b",
                                                                                   "uniqueItems": False}),
    ({"properties": {"a": {"enum": [{"format": "x", "uniqueItems": False}]}}}, {"a": {"format": "x",
                                                                                    "uniqueItems": False}}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "value"), NEUTRAL)
def test_rules_that_allow_everything_are_left_out(schema: dict[str, Any], value: dict[str, Any]) -> None:
    schema = {"type": "object"} | schema
    made = without_neutral_rules(schema)
    for candidate in (value, {"a": 1}, {"propertyNames": 1}, {"format": 1}, {"uniqueItems": True}):
        assert jsonschema.Draft202012Validator(made).is_valid(candidate) == jsonschema.Draft202012Validator(
            schema
        ).is_valid(candidate)
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    tokenizer = Tokenizer.from_file(f"{DEMO_MODEL}/tokenizer.json")
    ids = tokenizer.encode(json.dumps(value, separators=(",", ":")), add_special_tokens=False).ids
    matcher = Vocabulary(Path(DEMO_MODEL), tokenizer.get_vocab_size(), (0,)).compile(params).matcher()
    assert matcher.try_consume_tokens(ids) == len(ids)


@pytest.mark.parametrize(
    "rule", [{"propertyNames": {"maxLength": 3}}, {"dependentRequired": {"a": ["b"]}}, {"format": "regex"}]
)
def test_other_rules_are_still_refused(rule: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": STRING | rule}} if "format" in rule else {"type": "object"} | rule
    with pytest.raises(GrammarError, match="cannot be used"):
        Vocabulary(Path(DEMO_MODEL), 2048, (0,)).compile(StructuredOutputsParams(json=schema))
