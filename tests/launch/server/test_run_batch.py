"""`lockstep run-batch`: the answers of LLM in OpenAI's batch format, mistakes in the files, and a kill."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.launch.llm import LLM
from lockstep.launch.server.batch_file import AnswerFile, BatchRequest, read_requests

from small import COMMAND, SMALL, SMALL_FLAGS
from step_gate import StepGate
from waiting import PATIENCE_S, wait_until

PROMPTS = ["In the beginning", "And the LORD said unto Moses", "Blessed is the man"]
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "In the"}}


def line(**changes: Any) -> str:
    return json.dumps({**REQUEST, **changes}) + "\n"


def completions(num_tokens: int) -> Iterator[str]:
    for seed in range(8):
        for number, prompt in enumerate(PROMPTS):
            body = {"prompt": prompt, "max_tokens": num_tokens, "seed": seed, "ignore_eos": True}
            yield line(custom_id=f"{number}-{seed}", body=body)


def answers_in(path: Path) -> dict[str, dict[str, Any]]:
    """Return the response of each custom_id; none may have two."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert all(answer["error"] is None for answer in lines)
    answers = {answer["custom_id"]: answer["response"] for answer in lines}
    assert len(answers) == len(lines)
    return answers


def command(source: Path, target: Path, program: list[str] = COMMAND) -> list[str]:
    return [*program, "run-batch", *SMALL_FLAGS, "-i", str(source), "-o", str(target)]


@pytest.mark.process
def test_killed_batch_continues_with_the_answers_of_llm(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "Who was Moses?"}], "max_tokens": 8, "seed": 1}
    wrong = line(custom_id="wrong", body={"prompt": "a", "max_tokens": -1})
    response = line(
        custom_id="response", url="/v1/responses", body={"input": "Who was Moses?", "max_output_tokens": 8, "seed": 1}
    )
    chats = line(custom_id="chat", url="/v1/chat/completions", body=chat) + response
    source.write_text("".join(completions(80)) + chats + wrong)
    gate = StepGate(tmp_path / "gate")
    gate.limit(120)  # of more than 240 steps
    first = subprocess.Popen(command(source, target, gate.command), stderr=subprocess.PIPE)
    wait_until(lambda: target.exists() and target.read_bytes().count(b"\n") >= 3)
    first.kill()
    first.communicate(timeout=PATIENCE_S)
    with target.open("a") as half:
        half.write('{"custom_id": "half')
    before = target.read_text().splitlines()[:-1]
    assert len(before) < 27
    second = subprocess.run(command(source, target), capture_output=True, text=True, timeout=240)
    assert second.returncode == 1, "one answer is an error"
    assert f"27 requests, {len(before)} of them answered before" in second.stderr
    assert f"27 answers in {target}, 1 error" in second.stderr
    assert target.read_text().splitlines()[: len(before)] == before
    answers = answers_in(target)
    assert answers["wrong"]["status_code"] == 400
    assert answers["wrong"]["body"]["error"]["param"] == "max_tokens"
    with LLM(**SMALL) as llm:
        defaults, replace = llm.get_default_sampling_params(), msgspec.structs.replace
        for number, prompt in enumerate(PROMPTS):
            params = [replace(defaults, max_tokens=80, seed=seed, ignore_eos=True) for seed in range(8)]
            for seed, result in enumerate(llm.generate([prompt] * 8, params)):
                body = answers[f"{number}-{seed}"]["body"]
                assert body["choices"][0]["text"] == result.outputs[0].text
                assert body["usage"]["completion_tokens"] == 80
        (result,) = llm.chat(chat["messages"], replace(defaults, max_tokens=8, seed=1))  # type: ignore[arg-type]
    assert answers["chat"]["body"]["choices"][0]["message"]["content"] == result.outputs[0].text
    assert answers["response"]["body"]["output"][0]["content"][0]["text"] == result.outputs[0].text


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "has no requests"),
        ("\n\n", "has no requests"),
        ("{\n", "line 1: "),
        ("[]\n", "line 1: Expected `object`"),
        (line() + "\x00\n", "line 2: "),
        (line() + "\n" + line(), "line 3: custom_id 'a' is also in line 1"),
        (line(method="GET"), "line 1: Invalid enum value 'GET'"),
        (line(url="/v1/embeddings"), "line 1: url '/v1/embeddings' is not one of /v1/completions"),
        (line(custom_id=1), "line 1: Expected `str`, got `int`"),
        (line(body="x"), "line 1: Expected `object`, got `str`"),
        (line(body={"stream": True}), r"line 1: body\.stream must be false"),
        (line(extra=1), "line 1: Object contains unknown field `extra`"),
        ("{}\n" * 7, "line 5: .*; and 2 more lines"),
    ],
)
def test_mistakes_in_the_input_are_named(tmp_path: Path, text: str, mistake: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=mistake) as error:
        read_requests(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input file .*missing: No such file"):
        read_requests(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"input file .*: Is a directory"):
        read_requests(tmp_path)
    with pytest.raises(ValueError, match=r"output file .*: Is a directory"):
        AnswerFile(tmp_path)
    other = tmp_path / "other"
    other.write_text(line())
    with pytest.raises(ValueError, match=r"line 1 of output file .*other is no answer: .*; give another file"):
        AnswerFile(other)
    assert other.read_text() == line(), "it stays as it was"


@pytest.mark.process
@pytest.mark.parametrize("is_answered", [False, True])
def test_batch_without_work_starts_nothing(tmp_path: Path, is_answered: bool) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    if is_answered:
        source.write_text(line())
        request = BatchRequest("a", "POST", "/v1/completions", msgspec.Raw(b"{}"))
        with closing(AnswerFile(target)) as answers:
            answers.append(request, 200, b"{}")
    ended = subprocess.run([*command(source, target), "--tp=2"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == (0 if is_answered else 2)
    assert "Ray" not in ended.stderr
    assert ("1 answer in" if is_answered else "input file") in ended.stderr.splitlines()[-1]


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    request = BatchRequest("ü\n", "POST", "/v1/completions", msgspec.Raw(b"{}"))
    path = tmp_path / "out"
    with closing(AnswerFile(path)) as answers:
        answers.append(request, 200, b'{"text":"\xc3\xbc"}')
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    with closing(AnswerFile(path)) as answers:
        assert (answers.answered, answers.num_errors) == ({"ü\n"}, 0)
        assert path.read_bytes() == whole
        answers.append(msgspec.structs.replace(request, custom_id="b"), 400, b"{}")
        assert (answers.answered, answers.num_errors) == ({"ü\n", "b"}, 1)
    assert [json.loads(text)["custom_id"] for text in path.read_text().splitlines()] == ["ü\n", "b"]
