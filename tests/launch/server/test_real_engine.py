"""The server over a real engine with the demo model."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Annotated, Any, Literal, cast

import httpx
import pytest
from pydantic import BaseModel, Field

from lockstep import LLM
from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.runtime.sampling_params import SamplingParams
from lockstep.runtime.structured_outputs import StructuredOutputsParams

from fake_engine import CHAT, COMPLETION, PROMPT, Running, demo_server, error_of
from small import SMALL
from step_gate import steps_limited
from streams import begun_stream
from waiting import join, wait_until


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with demo_server(served_model_name=["demo"]) as running:
        yield running


def test_demo_model_answers_as_offline(real: Running) -> None:
    params = SamplingParams(n=2, seed=5, max_tokens=12, temperature=0.8, logprobs=2, stop="the")
    with LLM(**SMALL) as llm:
        expected = llm.generate([PROMPT, "Blessed"], params, use_tqdm=False)
        answer = llm.chat([CHAT], SamplingParams(max_tokens=9, temperature=0), use_tqdm=False)[0].outputs[0]
    request: dict[str, Any] = {
        "model": "demo", "prompt": [PROMPT, "Blessed"], "n": 2, "seed": 5, "max_tokens": 12, "temperature": 0.8,
        "top_p": 1, "logprobs": 2, "stop": "the", "extra_body": {"top_k": 0},
    }  # fmt: skip
    outputs = [o for r in expected for o in r.outputs]
    response = real.openai.completions.create(**request)
    assert [c.text for c in response.choices] == [o.text for o in outputs]
    assert [c.finish_reason for c in response.choices] == [o.finish_reason for o in outputs]
    for choice, output in zip(response.choices, outputs, strict=True):
        assert choice.logprobs is not None
        # Which requests share a batch depends on their arrival, and the batch changes the last bits of a sum.
        assert sum(choice.logprobs.token_logprobs or []) == pytest.approx(output.cumulative_logprob, abs=1e-4)
    texts = [""] * 4
    for chunk in real.openai.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [o.text for o in outputs]
    chat = real.openai.chat.completions.create(
        model="demo", messages=cast(Any, CHAT), max_tokens=9, temperature=0, extra_body={"repetition_penalty": 1}
    )
    assert chat.choices[0].message.content == answer.text


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    tags: Annotated[list[Literal["king", "prophet"]], Field(max_length=3)]


def test_openai_client_parses_structured_outputs(real: Running) -> None:
    """The client makes the schema from the class and parses the answer into an object."""
    parsed = real.openai.chat.completions.parse(
        model="demo", messages=cast(Any, CHAT), response_format=Person, seed=2, max_tokens=1000, temperature=1
    )
    assert parsed.choices[0].message.parsed is not None
    assert 0 <= parsed.choices[0].message.parsed.age <= 120
    with real.openai.chat.completions.stream(
        model="demo", messages=cast(Any, CHAT), response_format=Person, seed=2, max_tokens=1000, temperature=1
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed


def test_structured_output_equals_offline(real: Running) -> None:
    structured = StructuredOutputsParams(regex=r"(Moses|Aaron) (went|spake)( [a-z]{2,6}){2,5}\.")
    params = SamplingParams(n=3, seed=5, temperature=1, max_tokens=60, structured_outputs=structured)
    with LLM(**SMALL) as llm:
        outputs = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs
    response = real.openai.completions.create(
        model="demo", prompt=PROMPT, n=3, seed=5, temperature=1, max_tokens=60,
        top_p=1, extra_body={"guided_regex": structured.regex, "top_k": 0},
    )  # fmt: skip
    assert [c.text for c in response.choices] == [o.text for o in outputs]
    assert all(re.fullmatch(structured.regex or "", c.text) for c in response.choices)


REFUSED: list[tuple[dict[str, Any], str, str]] = [  # fields of a request, the field at fault, a part of the message
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_regex": "(?<=a)b"}, "guided_regex", "look-around"),
    ({"structured_outputs": {"regex": "(" * 9000 + ")" * 9000}}, "structured_outputs", "nest"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format", "Unimplemented keys"),
    ({"guided_json": {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(24)]}},
        "guided_json", "schema too large"),
    ({"guided_json": {"enum": [f"{i * 7919}" * 2 for i in range(5000)]}}, "guided_json", "limit"),
    ({"guided_grammar": "root ::= " * 3000}, "guided_grammar", "column 10: the rule 'root' is defined twice"),
    ({"guided_grammar": 'root ::= "a" missing'}, "guided_grammar", "column 14: the rule 'missing' is not defined"),
    ({"guided_grammar": 'root ::= "a"\nroot ::= "b"'}, "guided_grammar", "column 1: the rule 'root' is defined twice"),
    ({"guided_grammar": 'other ::= "a"'}, "guided_grammar", "No 'root' rule found"),
]  # fmt: skip


def test_hostile_grammars_are_refused_during_a_stream(real: Running) -> None:
    body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    expected = real.post("/v1/completions", body).json()["choices"][0]["text"]

    def text_of(response: httpx.Response) -> str:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    engine, gate = cast(AsyncEngine, real.service), ExitStack()
    with ThreadPoolExecutor(1) as thread, gate:
        gate.enter_context(steps_limited(engine, 300))
        with real.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            reading = thread.submit(text_of, response)
            for changes, param, message in REFUSED:
                answer = real.post("/v1/completions", {**COMPLETION, **changes})
                assert answer.status_code == 400, answer.text
                assert error_of(answer)["param"] == param
                assert message in error_of(answer)["message"]
            assert not reading.done(), "all of them came while the stream was going on"
            gate.close()
            assert reading.result() == expected


@pytest.mark.parametrize("fault", ["slow", "killed"])
def test_grammar_compiler_failure_costs_at_most_one_request(
    real: Running, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    body = {**COMPLETION, "guided_regex": f"a{{{len(fault)}}}", "max_tokens": 9}
    assert real.post("/v1/completions", {**body, "guided_regex": "first"}).status_code == 200
    check = cast(AsyncEngine, real.service)._grammars
    compiler = check._process
    assert compiler is not None
    if fault == "slow":
        monkeypatch.setattr(check, "time_limit_s", 0.2)
        os.kill(compiler.pid, signal.SIGSTOP)
    else:
        os.kill(compiler.pid, signal.SIGKILL)
    answer = real.post("/v1/completions", body)
    if fault == "slow":
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "guided_regex"
        assert "takes more than 0.2 s" in error_of(answer)["message"]
    monkeypatch.undo()
    assert real.post("/v1/completions", body).json()["choices"][0]["text"] == "a" * len(fault)
    wait_until(lambda: compiler._process.poll() is not None)


def test_new_grammars_wait_in_a_short_queue(real: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    check = cast(AsyncEngine, real.service)._grammars
    problem, may_go_on = check._problem, threading.Event()

    def wait_and_compile(line: bytes, kind: str) -> str | None:
        may_go_on.wait(60)
        return problem(line, kind)

    monkeypatch.setattr(check, "_problem", wait_and_compile)
    body = {**COMPLETION, "max_tokens": 2}
    statuses: list[int] = []

    def send(pattern: str) -> None:
        statuses.append(real.post("/v1/completions", {**body, "guided_regex": pattern}).status_code)

    same = ["[ab]{7}"] * 30  # they share one place
    threads = [threading.Thread(target=send, args=(p,)) for p in (*same, *(f"[ab]{{{i + 10}}}" for i in range(15)))]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(check._answers) == 16)
    refused = real.post("/v1/completions", {**body, "guided_regex": "[ab]{99}"})
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
    may_go_on.set()
    for thread in threads:
        join(thread)
    assert statuses == [200] * 45
    assert real.post("/v1/completions", {**body, "guided_regex": "[ab]{99}"}).status_code == 200


def test_disconnect_frees_the_engine(real: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1000, "n": 4, "ignore_eos": True}
    engine = cast(AsyncEngine, real.service)
    with steps_limited(engine, 20):
        with begun_stream(real.http, body):
            assert engine.stats().num_live == 4
        wait_until(lambda: engine.stats().num_live == 0)
    assert real.http.get("/health").status_code == 200
