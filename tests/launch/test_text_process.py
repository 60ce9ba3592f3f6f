"""Chat templates in a process: offline results, failures, an end from outside, and the limits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from lockstep.launch import text_process
from lockstep.launch.child_process import ChildFailed, ChildProcess, calling
from lockstep.launch.errors import TokenizerBusy
from lockstep.launch.llm import LLM
from lockstep.launch.text_process import IsolatedTokenizer, TextProcess, TextRefused, encode_job
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.text_worker import EncodeJob, main
from lockstep.runtime.tokenizer import Tokenizer

from small import SMALL
from waiting import wait_until

CHAT = [{"role": "user", "content": "Who was Moses?"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[IsolatedTokenizer]:
    with closing(IsolatedTokenizer(Path(DEMO_MODEL))) as tokenizer:
        yield tokenizer


def test_results_equal_those_of_this_process(tokenizer: IsolatedTokenizer) -> None:
    assert tokenizer.encode_chat(CHAT) == Tokenizer.encode_chat(tokenizer, CHAT)
    assert tokenizer.encode_chat(CHAT, {"bos_token": "é"}) == Tokenizer.encode_chat(tokenizer, CHAT, {"bos_token": "é"})


def test_process_that_was_killed_from_outside_is_replaced(
    tokenizer: IsolatedTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokenizer.encode_chat(CHAT)
    process = tokenizer._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    end = f"the process that tokenizes (pid {process.pid}) has ended: killed by SIGKILL"
    wait_until(lambda: end in caplog.text)  # also without another text
    assert tokenizer.encode_chat(CHAT) == expected
    with closing(IsolatedTokenizer(Path(DEMO_MODEL))) as closed:
        closed.encode_chat(CHAT)
    assert caplog.text.count("has ended") == 1, "not the one that was closed"


@pytest.mark.parametrize("has_started", [False, True])
def test_interrupted_job_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch, has_started: bool) -> None:
    def interrupt(process: ChildProcess, timeout_s: float | None) -> None:
        raise KeyboardInterrupt

    with closing(IsolatedTokenizer(Path(DEMO_MODEL))) as tokenizer:
        if has_started:
            tokenizer.encode_chat(CHAT)
        with monkeypatch.context() as patch:
            patch.setattr(ChildProcess, "answer", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tokenizer.encode_chat([{"role": "user", "content": "Who was Noah?"}])
        assert tokenizer.encode_chat(CHAT) == Tokenizer.encode_chat(tokenizer, CHAT)


def test_values_without_json_are_refused(tokenizer: IsolatedTokenizer) -> None:
    with pytest.raises(TextRefused, match="the input is not JSON: "):
        tokenizer.encode_chat([{"role": "user", "content": object()}])
    with pytest.raises(TextRefused, match="the input is not JSON: "):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


def test_template_beyond_the_memory_is_refused(tokenizer: IsolatedTokenizer) -> None:
    for template in ("{{ 'a' * 10 ** 10 }}", "{{ 'a'.center(10 ** 10) }}"):
        with pytest.raises(TextRefused, match="does not accept these messages: MemoryError"):
            tokenizer.encode_chat(CHAT, {"chat_template": template})


def test_text_beyond_the_memory_is_refused(tokenizer: IsolatedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_process, "MEMORY_BYTES", 256 * 2**20)
    with closing(TextProcess(tokenizer, 5.0)) as process:
        assert process.run(encode_job(EncodeJob(["In the beginning"]))) == [tokenizer.encode("In the beginning")]
        with pytest.raises(TextRefused, match=r"ended the process|took more than 5 s") as caught:
            process.run(encode_job(EncodeJob(["a" * 4_000_000])))
        assert caught.value.code == "too_complex"
        assert process.run(encode_job(EncodeJob(["Blessed"]))) == [tokenizer.encode("Blessed")]


def test_process_without_a_parent_ends_in_time(tokenizer: IsolatedTokenizer) -> None:
    with closing(ChildProcess(calling(main))) as process:
        assert process.request(msgspec.json.encode(tokenizer.state(time_limit_s=0.1)), 60) == "ready"
        with pytest.raises(ChildFailed):
            process.request(encode_job(tokenizer.chat_job(CHAT, {"chat_template": ENDLESS})), 60)
        assert process._process.wait(60) == -signal.SIGALRM


def test_closed_process_takes_no_job(tokenizer: IsolatedTokenizer) -> None:
    process = TextProcess(tokenizer)
    process.close()
    process.close()
    with pytest.raises(TokenizerBusy, match="the process that tokenizes is closed"):
        process.run(encode_job(EncodeJob(["a"])))


def test_process_that_cannot_start_is_not_the_fault_of_the_text(
    tokenizer: IsolatedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_process, "MEMORY_BYTES", 2**20)
    with closing(TextProcess(tokenizer)) as process, pytest.raises(TokenizerBusy, match="cannot be started"):
        process.run(encode_job(EncodeJob(["a"])))


def test_process_killed_while_it_starts_is_replaced(
    tokenizer: IsolatedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [None] * 2

    class KilledProcess(ChildProcess):
        def request(self, line: bytes, timeout_s: float) -> object:
            if left:
                os.kill(self.pid, signal.SIGKILL)
                left.pop()
            return super().request(line, timeout_s)

    monkeypatch.setattr(text_process, "ChildProcess", KilledProcess)
    with closing(TextProcess(tokenizer)) as process:
        assert process.run(encode_job(EncodeJob(["a"]))) == [tokenizer.encode("a")]


def test_endless_template_ends_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**SMALL) as llm:
        llm.tokenizer._tokenizer.chat_template = ENDLESS
        assert isinstance(llm.tokenizer, IsolatedTokenizer)
        llm.tokenizer._process._time_limit_s = 0.5
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"the input took more than 0\.5 s to turn into tokens"):
            llm.chat(CHAT)
        assert time.monotonic() - started < 60
        process = llm.tokenizer._process
    assert process._process is None, "ended with the model"
