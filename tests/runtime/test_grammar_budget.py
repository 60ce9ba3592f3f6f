"""The limits of grammars: time, the lexer's states, compilation beside the steps, and the compiler's errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llguidance
import numpy as np
import pytest

from lockstep import SamplingParams, StructuredOutputsParams
from lockstep.runtime.engine import Engine
from lockstep.runtime.plan import Admission
from lockstep.runtime.sampling import grammar, grammar_budget, grammar_state
from lockstep.runtime.sampling.grammar import CompiledGrammar, GrammarError, Vocabulary, try_out
from lockstep.runtime.sampling.grammar_budget import CHEAP_S, MAX_DEBT_S, MIN_EARNED_S, GrammarCost, MaskBudget

from checkpoints import ascii_checkpoint
from engines import request, run_engine

EOS = 2
PROMPT = [5, 6, 7]
SLOW = {"regex": "[ab]{40}"}
OTHER = {"regex": "[bc]{10,30}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ascii_checkpoint(tmp_path_factory.mktemp("grammars"))


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    grammar._compiled.cache_clear()


def constrained(uid: int, options: dict[str, Any], **more: Any) -> Any:
    structured = StructuredOutputsParams(**options)
    return request(uid, PROMPT, (EOS,), max_tokens=40, temperature=1.0, structured_outputs=structured, **more)


def test_budget_ends_the_slowest_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(grammar_budget.time, "perf_counter", lambda: now)
    budget, slow, slower, cheap = MaskBudget(), GrammarCost(), GrammarCost(), GrammarCost()
    costs = [slow, slower, cheap]
    for _ in range(20):  # 19 ms a step, and 20 ms for all else: no debt
        now += 0.039
        budget.begin_step()
        for cost, seconds in zip(costs, (0.006, 0.012, 0.001), strict=True):
            budget.add_mask(cost, seconds)
            budget.enforce(costs)
    assert not any(cost.is_banned for cost in costs)
    num_steps = 0
    while not slower.is_banned:  # all else takes 2 ms, but 10 ms are free
        now += 0.021
        budget.begin_step()
        for cost, seconds in zip(costs, (0.006, 0.012, 0.001), strict=True):
            budget.add_mask(cost, seconds)
            budget.enforce(costs)
        num_steps += 1
    assert num_steps == pytest.approx(MAX_DEBT_S / (0.019 - MIN_EARNED_S), abs=2)
    assert not slow.is_banned
    assert "12.0 ms" in slower.verdict or "11." in slower.verdict


def test_budget_never_ends_cheap_grammars() -> None:
    budget, costs = MaskBudget(), [GrammarCost() for _ in range(300)]
    for _ in range(50):
        budget.begin_step()
        for cost in costs:
            budget.add_mask(cost, 0.9 * CHEAP_S)
            budget.enforce(costs)
    assert budget.debt_s > MAX_DEBT_S
    assert not any(cost.is_banned for cost in costs)


def slow_down(monkeypatch: pytest.MonkeyPatch, folder: Path, options: dict[str, Any]) -> None:
    """Let each mask of one grammar cost a second, and the others nothing."""
    slow = Vocabulary(folder, 131, (EOS,)).compile(StructuredOutputsParams(**options)).cost
    charge = MaskBudget.add_mask

    def add_mask(self: MaskBudget, cost: GrammarCost, seconds: float) -> None:
        charge(self, cost, 1.0 if cost is slow else 0.0)

    monkeypatch.setattr(MaskBudget, "add_mask", add_mask)
    monkeypatch.setattr(MaskBudget, "add_tokens", lambda *_: None)


@pytest.mark.parametrize(("tp", "overlap"), [(1, False), (1, True), (2, False), (2, True)])
def test_slow_grammar_ends_and_others_keep_their_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tp: int, overlap: bool
) -> None:
    others = [constrained(uid, OTHER) for uid in range(3)] + [request(3, PROMPT, temperature=1.0)]
    expected = run_engine(folder, others)
    slow_down(monkeypatch, folder, SLOW)
    actual = run_engine(folder, [*others, *(constrained(uid, SLOW) for uid in range(10, 16))], tp=tp, overlap=overlap)
    assert {uid: actual.tokens[uid] for uid in range(4)} == expected.tokens
    for uid in range(10, 16):
        assert actual.finished[uid].reason == "error"
        assert "its masks take" in str(actual.finished[uid].error)
        assert len(actual.tokens.get(uid, [])) <= 1
    again = run_engine(folder, [constrained(20, SLOW)])
    assert again.finished[20].reason == "error", "for a minute it is refused"
    later = time.monotonic() + grammar_budget.BAN_S + 1
    monkeypatch.setattr(grammar_budget.time, "monotonic", lambda: later)
    monkeypatch.setattr(MaskBudget, "add_mask", lambda *_: None)
    assert len(run_engine(folder, [constrained(21, SLOW)]).tokens[21]) > 10


def test_slow_grammar_ends_while_its_tokens_are_consumed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a preemption or a restart of the ranks."""
    produced = run_engine(folder, [constrained(0, SLOW)]).tokens[0]
    compiled = Vocabulary(folder, 131, (EOS,)).compile(StructuredOutputsParams(**SLOW))
    monkeypatch.setattr(grammar_state, "REPLAYED_TOKENS", 4)
    monkeypatch.setattr(MaskBudget, "add_tokens", lambda self, cost, seconds: cost.ban())
    again = constrained(0, SLOW)
    tokens = np.array([*PROMPT, *produced], np.int32)
    admission = Admission(0, tokens, len(PROMPT), again.params, [EOS])
    state = grammar_state.GrammarState(compiled, admission, MaskBudget())
    assert "its masks take" in str(state.error)
    assert len(state._tokens) == 4, "it stops at the first look at the budget"


def test_rank_0_alone_has_grammars(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = grammar_state.GrammarState.__init__

    def count(self: Any, *arguments: Any) -> None:
        made.append(1)
        init(self, *arguments)

    monkeypatch.setattr(grammar_state.GrammarState, "__init__", count)
    run_engine(folder, [constrained(uid, OTHER) for uid in range(3)], tp=2)
    assert len(made) == 3


def test_full_lexer_is_renewed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with one grammar share its lexer, whose states add up; each alone stays below the limit."""
    pattern = {"regex": "[ab]*a[ab]{9}c"}
    requests = [constrained(uid, pattern) for uid in range(24)]
    expected = run_engine(folder, requests).tokens
    renewals: list[int] = []
    renew = CompiledGrammar.renew
    monkeypatch.setattr(CompiledGrammar, "renew", lambda self: (renewals.append(1), renew(self))[1])
    for max_states in (2000, 1500, 1200, 900, 700, 500):
        limits = llguidance.LLParserLimits(max_lexer_states=max_states, verbose_errors=False)
        monkeypatch.setattr(grammar, "LIMITS", limits)
        grammar._compiled.cache_clear()
        actual = run_engine(folder, requests)
        if renewals:
            break
    assert renewals, max_states
    assert actual.tokens == expected
    assert {end.reason for end in actual.finished.values()} <= {"stop", "length"}


def test_grammars_compile_beside_the_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init, free_ended, were_beside = CompiledGrammar.__init__, threading.Event(), list[bool]()

    def compile_slowly(self: Any, *arguments: Any) -> None:
        were_beside.append(free_ended.wait(60))
        time.sleep(0.3)
        init(self, *arguments)

    monkeypatch.setattr(CompiledGrammar, "__init__", compile_slowly)
    requests = [constrained(0, SLOW), constrained(1, {"regex": "("}), constrained(2, OTHER), request(3, PROMPT)]

    def between(step: int, engine: Engine) -> None:
        if step == 1:
            engine.cancel([2])
        if not engine.scheduler.has_work:
            free_ended.set()

    actual = run_engine(folder, requests, between=between)
    assert were_beside
    assert all(were_beside), "the steps of the request without a grammar waited for none"
    assert len(actual.tokens[3]) == 16
    assert len(actual.tokens[0]) > 10
    assert (actual.finished[1].reason, actual.finished[2].reason) == ("error", "abort")
    assert "unclosed group" in str(actual.finished[1].error)
    assert actual.steps < 300, "an engine that only waits for a grammar does not spin"


AMBIGUOUS = [
    {"grammar": 'start: s\ns: s s s s | "a" | "b" |'}, {"grammar": 'root ::= s\ns ::= s s s s | "a" | "b" | ""'},
    {"grammar": "start: s\ns: s s | /./ |"}, {"regex": ".*a.{18}b"}, {"regex": "(.*[ab].{12}b|.*[bc].{11}c).*"},
    {"grammar": 'start: a a a a a a a a\na: b b b |\nb: a | "x" | "ab" | "b" |'}, {"regex": ".*b.{0,5000}a"},
    {"regex": r"(\\p{L}{1,20}\\p{N}?){1,50}"}, {"regex": ".{0,5000}"}, {"regex": "(.{1,500}x){1,50}"},
    {"grammar": "start: (" + "|".join(f"T{i}" for i in range(60)) + ")*\n"
     + "\n".join(f"T{i}: /.*{chr(97 + i % 26)}.{{{i % 13}}}{chr(97 + i % 7)}.*/" for i in range(60))},
    {"json": {"type": "object", "patternProperties": {".*a.{9}b": {"type": "string"}}}},
    {"json": {"$defs": {"n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}, {"$ref": "#/$defs/n"}]}},
              "$ref": "#/$defs/n"}},
]  # fmt: skip


@pytest.mark.parametrize("options", AMBIGUOUS, ids=lambda options: str(options)[:40])
def test_time_of_hostile_grammars_is_bounded(folder: Path, options: dict[str, Any]) -> None:
    """Without a budget some of these take minutes. CPU time is compared, which other processes do not change."""
    started = time.thread_time()
    try:
        try_out(Vocabulary(folder, 131, (EOS,)), StructuredOutputsParams(**options))
    except GrammarError:
        assert time.thread_time() - started < 2.0
        return
    free = [request(100 + i, PROMPT, temperature=1.0, max_tokens=100) for i in range(8)]
    alone = run_engine(folder, free)
    calm, started = time.thread_time() - started, time.thread_time()
    actual = run_engine(folder, [*(constrained(uid, options, ignore_eos=False) for uid in range(16)), *free])
    assert time.thread_time() - started < 3 * calm + 2.0
    assert {uid: tokens for uid, tokens in actual.tokens.items() if uid >= 100} == alone.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": 'root ::= "a" missing'}, "line 1, column 14: the rule 'missing' is not defined"),
        ({"grammar": 'root ::= "a"\nroot ::= "b"'}, "line 2, column 1: the rule 'root' is defined twice"),
        ({"grammar": 'other ::= "a"'}, "No 'root' rule found"),
        ({"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, "nested too deeply"),
        ({"grammar": 'root ::= "a'}, 'line 1, column 10: the text or class that begins with " does not end'),
        ({"grammar": 'root ::= [a-'}, "line 1, column 10: the text or class that begins with"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": 'start: "a"\nstart: "b"'}, "start"),
        ({"grammar": 'other: "a"'}, "no start rule found"),
        ({"grammar": "\x00"}, ""),
        ({"grammar": ""}, ""),
        ({"regex": "(?P<a"}, ""),
        ({"json": {"type": "nothing"}}, "nothing"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"type": "string", "pattern": "("}}, ""),
        ({"json": {"minimum": "x", "type": "integer"}}, ""),
    ],
)  # fmt: skip
def test_compile_errors_are_the_compilers_words(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GrammarError, match=r"^structured_outputs=\w+ cannot be used: .") as raised:
        try_out(Vocabulary(folder, 131, (EOS,)), StructuredOutputsParams(**options))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_thousands_of_choices(folder: Path) -> None:
    choices = [f"word {i * 7919 % 100_000} of {i}" for i in range(3000)]
    (tokens,) = run_engine(folder, [constrained(0, {"choice": choices})]).tokens.values()
    assert len(tokens) > 8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"regexp": "a"}, r"has the unknown field 'regexp'; there is json, regex"),
        (5, "5 is not a StructuredOutputsParams or a dictionary of its fields"),
        ("a+", "'a\\+' is not a StructuredOutputsParams"),
        ({"regex": 5}, "has regex of type int; give a string"),
        ({"choice": "abc"}, "has choice of type str; give a list of strings"),
        ({"json": [1]}, "has json of type list; give a JSON schema"),
        ({"json_object": "yes"}, "has json_object of type str; give True"),
        ({}, "has nothing; give exactly one of"),
    ],
)
def test_values_of_wrong_types_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^structured_outputs={message}"):
        SamplingParams(structured_outputs=value)


def test_dictionary_is_accepted() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]})  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputsParams(choice=["a", "b"])


def test_requests_without_grammar_do_not_wait_for_slow_masks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of 4 ms beside 2 ms of other work: the streams of the others have two steps of three without a mask."""
    slow = Vocabulary(folder, 131, (EOS,)).compile(StructuredOutputsParams(**SLOW)).cost
    constrained_requests = [constrained(uid, SLOW) for uid in range(10, 14)]
    expected = run_engine(folder, [*constrained_requests, request(0, PROMPT, max_tokens=100)])
    clock = 0.0

    def add_mask(self: MaskBudget, cost: GrammarCost, seconds: float) -> None:
        nonlocal clock
        clock += 0.004
        masks.append(1)
        charge(self, cost, 0.004)

    def begin_step(self: MaskBudget) -> None:
        nonlocal clock
        clock += 0.002
        gaps.append(len(masks))
        masks.clear()
        begin(self)

    masks, gaps, charge, begin = list[int](), list[int](), MaskBudget.add_mask, MaskBudget.begin_step
    fake_time = SimpleNamespace(perf_counter=lambda: clock, monotonic=time.monotonic)
    monkeypatch.setattr(grammar_budget, "time", fake_time)
    monkeypatch.setattr(MaskBudget, "add_mask", add_mask)
    monkeypatch.setattr(MaskBudget, "begin_step", begin_step)
    monkeypatch.setattr(MaskBudget, "add_tokens", lambda *_: None)
    actual = run_engine(folder, [*constrained_requests, request(0, PROMPT, max_tokens=100)])
    assert actual.tokens == expected.tokens
    assert slow.mask_s > CHEAP_S
    assert max(gaps[20:]) == 1  # of the constrained requests alone, too
    beside = gaps[10:90]  # while request 0 decodes
    assert max(beside) == 1
    assert sum(beside) < len(beside) / 2
    assert 1 in beside
