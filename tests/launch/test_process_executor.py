"""One rank in a process of its own: the tokens of a rank in this process, and what happens when the process fails."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams
from lockstep.comm.message_sockets import WakeupEvent
from lockstep.launch import executor_choice
from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.launch.errors import RankFailed
from lockstep.launch.process_executor import ProcessExecutor
from lockstep.runtime.config import DEMO_MODEL, Config
from lockstep.runtime.executor import EngineClosed
from lockstep.runtime.frontend import Frontend
from lockstep.runtime.tokenizer import Tokenizer

from small import SMALL
from waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.process
CONFIG = Config(**SMALL)
PROMPTS = ["In the beginning", "And the LORD said unto Moses"]
PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@contextmanager
def started(**options: Any) -> Iterator[ProcessExecutor]:
    wakeup = WakeupEvent()
    config = Config(**(SMALL | options))
    with closing(wakeup), closing(ProcessExecutor(config, Path(DEMO_MODEL), wakeup)) as executor:
        yield executor


def poll_until_failure(frontend: Frontend | ProcessExecutor) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        frontend.poll(5)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_tokens_and_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with LLM(**SMALL) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
    with started() as executor:
        pid = executor.locations[0].pid
        assert pid != os.getpid()
        assert f"1 rank in process {pid} ready in" in caplog.text
        os.kill(pid, signal.SIGTERM)  # a supervisor's: requests are drained first
        frontend = Frontend(executor, Tokenizer(Path(DEMO_MODEL)), [])
        generations = [frontend.prepare(prompt, PARAMS) for prompt in PROMPTS]
        frontend.submit(generations)
        while frontend.live:
            frontend.poll(60)
        assert [g.outputs[0].completion.token_ids for g in generations] == expected
        assert executor.stats.output_tokens == 60
    wait_until(lambda: not is_alive(pid))
    with pytest.raises(EngineClosed, match="ended by close"):
        executor.poll(0)


@pytest.mark.nightly
def test_mistakes_are_value_errors() -> None:
    with pytest.raises(ValueError, match="this host has"), started(num_pages=10**9):
        pass


@pytest.mark.nightly
def test_death_and_silence_are_named() -> None:
    with started(step_timeout=1.0) as executor:
        pid = executor.locations[0].pid
        frontend = Frontend(executor, Tokenizer(Path(DEMO_MODEL)), [])
        frontend.submit([frontend.prepare("In", SamplingParams(max_tokens=400, ignore_eos=True))])
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(RankFailed, match=f"no step has ended for 1 s, step_timeout is over: .* process {pid}"):
            poll_until_failure(frontend)
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "died" in str(executor._failure))
        with pytest.raises(RankFailed, match=f"rank 0 in process {pid} died: killed by SIGKILL"):
            poll_until_failure(frontend)


@pytest.mark.nightly
def test_server_continues_when_the_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**SMALL) as llm:
        params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
        (expected,) = llm.generate(PROMPTS[:1], params)
    monkeypatch.setattr(executor_choice, "runs_on_gpu", lambda config: True)
    engine = AsyncEngine(CONFIG)
    engine.start()

    async def main() -> None:
        tokens: list[int] = []
        async for event in engine.generate(expected.prompt_token_ids, params):
            tokens += event.token_ids
            if len(tokens) < 10 and engine.health.restarts == 0:
                os.kill(engine.stats().ranks[0].pid, signal.SIGKILL)
        assert tokens == expected.outputs[0].token_ids
        assert engine.health.restarts == 1
        pid = engine.stats().ranks[0].pid
        await engine.close()
        assert not is_alive(pid)

    asyncio.run(main())


def test_close_in_another_thread_ends_a_poll() -> None:
    """ZeroMQ's sockets belong to one thread: closed under a poll, they fail with ENOTSOCK."""
    with started() as executor, ThreadPoolExecutor(1) as thread:
        polled = thread.submit(poll_until_failure, executor)
        time.sleep(0.05)
        executor.close()
        with pytest.raises(EngineClosed, match="ended by close"):
            polled.result(PATIENCE_S)
