"""`lockstep chat`: scripted conversations with a stub, and with the demo model in this process."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lockstep.launch.cli.chat import HELP, local, talk
from lockstep.launch.cli.main import app
from lockstep.launch.llm import LLM
from lockstep.runtime.chat.call_readers import AnswerPart
from lockstep.runtime.config import DEMO_MODEL

from small import SMALL, as_flags
from stub import conversation, refuse, stub_server

OPTIONS: dict[str, Any] = {**SMALL, "num_pages": 64, "max_num_seqs": 2}


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def chat(lines: list[str], *arguments: str) -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], input="".join(f"{line}\n" for line in lines))


def text_of(parts: Iterator[AnswerPart]) -> str:
    return "".join(part.text for part in parts)


def talk_with_an_error(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], number: int, error: BaseException
) -> tuple[list[list[str]], str]:
    """Talk to a stand-in whose answer with this number, from 1, breaks off; return all questions, and the output."""
    questions: list[list[str]] = []

    def answer(messages: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[AnswerPart]:
        questions.append([m["content"] for m in messages])
        yield AnswerPart("content", "half")
        if len(questions) == number:
            raise error
        yield AnswerPart("content", " whole")

    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    out = io.StringIO()
    talk(answer, out)
    return questions, out.getvalue()


def said(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_conversation_with_a_server() -> None:
    lines = [
        "who was Moses", "", "/set temperature 0.5", "/set max_tokens 9", "and Aaron",
        "/clear", "anew", "/exit", "unread",
    ]  # fmt: skip
    with stub_server(conversation) as stub:
        ended = chat(lines, f"--url={stub.url}")
    assert ended.exit_code == 0, ended.output
    first = ("user", "who was Moses"), ("assistant", "Moses was who ")
    assert [said(body) for body in stub.bodies] == [[first[0]], [*first, ("user", "and Aaron")], [("user", "anew")]]
    settings = [{k: v for k, v in body.items() if k != "messages"} for body in stub.bodies]
    common = {"model": "stub", "stream": True}
    assert settings == [common, *[common | {"temperature": 0.5, "max_tokens": 9}] * 2]
    assert [line for line in ended.stdout.split("\n") if line.endswith(" ")] == [
        "Moses was who ",
        "Aaron and ",
        "anew ",
    ]


def test_server_refusal_is_shown_and_conversation_continues() -> None:
    with stub_server(lambda number, body: conversation(number, body) if number else refuse(503, "not yet")) as stub:
        ended = chat(["first", "second"], "named", f"--url={stub.url}")
    assert ended.exit_code == 0, ended.output
    assert "error: HTTP 503: not yet" in ended.stdout
    assert [said(body) for body in stub.bodies] == [[("user", "first")], [("user", "second")]]
    assert {body["model"] for body in stub.bodies} == {"named"}


def test_refused_repetition_keeps_the_answer() -> None:
    with stub_server(lambda number, body: refuse(503, "full") if number == 1 else conversation(number, body)) as stub:
        ended = chat(["first", "/again", "second"], f"--url={stub.url}")
    assert "error: HTTP 503: full" in ended.stdout
    first = ("user", "first")
    assert [said(body) for body in stub.bodies] == [
        [first],
        [first],
        [first, ("assistant", "first "), ("user", "second")],
    ]


def test_answer_is_kept_if_its_repetition_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, output = talk_with_an_error(monkeypatch, ["one", "/again", "two"], 2, ValueError("the server is gone"))
    assert questions == [["one"], ["one"], ["one", "half whole", "two"]]
    assert "half\nerror: the server is gone\n" in output


def test_page_instead_of_a_completion_is_an_error() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n"
    with stub_server(lambda number, body: [head, b"<html></html>"]) as stub:
        ended = chat(["hello"], "named", f"--url={stub.url}")
    assert "answered without a completion (text/html); is it an OpenAI-compatible server?" in ended.stdout


def test_two_slashes_send_a_message_that_begins_with_one() -> None:
    with stub_server(conversation) as stub:
        chat(["//etc/fstab // is a file"], f"--url={stub.url}")
    assert [said(body) for body in stub.bodies] == [[("user", "/etc/fstab // is a file")]]


def test_unreachable_server_is_reported() -> None:
    for model in ([], ["named"]):
        ended = chat(["hello"], *model, "--url=http://127.0.0.1:9")
        assert ended.exit_code != 0
        assert isinstance(ended.exception, ValueError)
        assert str(ended.exception).startswith("no server answers at http://127.0.0.1:9: ")


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("/set temperature warm", "error: temperature=warm is not a number"),
        ("/set top_k 1.5", "error: top_k=1.5 is not an integer"),
        ("/set max_tokens 9" + "9" * 5000, "is not an integer"),
        ("/set temperature nan", "error: temperature=nan must be between 0 and 2"),
        ("/set temperature 3", "error: temperature=3.0 must be between 0 and 2"),
        ("/set n 2", "error: write /set NAME VALUE with one of temperature"),
        ("/set max_tokens=20", "error: write /set NAME VALUE with one of temperature"),
        ("/what", "error: there is no /what; /help lists the commands"),
        ("/think maybe", "error: there is no /think maybe"),
        ("/help", HELP),
        ("/thinking", "the last answer has no reasoning"),
        ("/again", "there is no answer yet"),
    ],
)
def test_bad_slash_commands(line: str, reply: str) -> None:
    with stub_server(conversation) as stub:
        ended = chat([line], f"--url={stub.url}")
    assert reply in ended.stdout.removeprefix(HELP)
    assert stub.bodies == []


def test_local_options_are_refused_with_url() -> None:
    with pytest.raises(ValueError, match="--url: the server has its own --tensor-parallel-size; drop that option"):
        CliRunner().invoke(app, ["chat", "--tp=2", "--url=http://127.0.0.1:9"], catch_exceptions=False)


def test_ctrl_c_stops_an_answer_and_keeps_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, output = talk_with_an_error(monkeypatch, ["one", "two"], 1, KeyboardInterrupt())
    assert questions == [["one"], ["one", "half", "two"]]
    assert output.endswith("half [stopped]\nhalf whole\n")


class Interrupting(io.StringIO):
    """An output that presses Ctrl-C at the third piece of an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = 0

    def flush(self) -> None:
        self.pieces += 1
        if self.pieces == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_local_model_is_stopped_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "/set temperature 0\n/set max_tokens 40\nAnd the king said\n/clear\n/set max_tokens 5\nWho was Moses?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    out, before = Interrupting(), signal.getsignal(signal.SIGINT)
    with LLM(**OPTIONS) as llm:
        talk(local(llm), out)
        assert signal.getsignal(signal.SIGINT) is before
        params = {"temperature": 0, "max_tokens": 5}
        alone = text_of(local(llm)([{"role": "user", "content": "Who was Moses?"}], params))
        full = text_of(local(llm)([{"role": "user", "content": "And the king said"}], params | {"max_tokens": 40}))
    stopped, after = out.getvalue().split(" [stopped]\n")
    partial = stopped.removeprefix(HELP).split("\n", 3)[3]  # after what was set
    assert partial
    assert full.startswith(partial)
    assert partial != full
    assert after.endswith(f"\n{alone}\n")


def test_chat_command_with_local_model() -> None:
    flags = as_flags(OPTIONS)
    ended = chat(["/set temperature 0", "/set max_tokens 5", "Who was Moses?"], *flags)
    assert ended.exit_code == 0, ended.output
    with LLM(**OPTIONS) as llm:
        expected = text_of(
            local(llm)([{"role": "user", "content": "Who was Moses?"}], {"temperature": 0, "max_tokens": 5})
        )
    assert ended.stdout.endswith(f"\n{expected}\n")


def test_reasoning_is_folded_and_the_conversation_is_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def answer(messages: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[AnswerPart]:
        bodies.append((messages, dict(settings)))
        yield AnswerPart("reasoning", "let me ")
        yield AnswerPart("reasoning", "think")
        yield AnswerPart("content", f"answer {len(bodies)}")

    lines = ["/system Be brief.", "one", "/thinking", "/think off", "/again", "two", "/system", "three"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    out = io.StringIO()
    talk(answer, out)
    shown = re.sub(r"\d\.\d s", "N s", out.getvalue().removeprefix(HELP)).split("\n")[1:]
    folded = "[thinking ... N s]"
    assert shown == [
        "the system message is set", folded, "answer 1", "let me think", "enable_thinking is off",
        folded, "answer 2", folded, "answer 3", "no system message", folded, "answer 4", "",
    ]  # fmt: skip
    assert [[message["content"] for message in messages] for messages, _ in bodies] == [
        ["Be brief.", "one"], ["Be brief.", "one"], ["Be brief.", "one", "answer 2", "two"],
        ["one", "answer 2", "two", "answer 3", "three"],
    ]  # fmt: skip
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert [settings for _, settings in bodies] == [{}, off, off, off]


def test_local_reasoning_is_found_by_the_template(tmp_path: Path) -> None:
    """The demo model does not think: its prompt opens the reasoning, and it never closes it."""
    folder = Path(shutil.copytree(DEMO_MODEL, tmp_path / "thinks"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}<think>\n{#</think>#}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with LLM(str(folder), **OPTIONS) as llm:
        settings = {"temperature": 0, "max_tokens": 8}
        parts = list(local(llm)([{"role": "user", "content": "Who was Moses?"}], settings))
    assert parts
    assert {part.kind for part in parts} == {"reasoning"}
