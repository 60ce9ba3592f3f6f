"""Checkpoints that cannot be used: one line that names the file, within seconds, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from lockstep import LLM

from bad_checkpoints import CASES, copy_of_demo
from forked_commands import ForkedCommands
from small import COMMAND, SMALL, SMALL_FLAGS
from waiting import PATIENCE_S

LIMIT_S = 5  # of CPU time, which other processes do not change


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Fail after LIMIT_S, and raise TimeoutError where the process waits for a file."""

    def expire(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"not refused within {PATIENCE_S:g} s")

    before, started = signal.signal(signal.SIGALRM, expire), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < LIMIT_S


@pytest.mark.parametrize("name", CASES)
def test_bad_checkpoint_is_refused_in_one_line(name: str, tmp_path: Path, time_limit: None) -> None:
    damage, file = CASES[name]
    folder = copy_of_demo(tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError) as error:
        LLM(str(folder), **SMALL)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    assert file in message
    assert ";" in message  # the way out


COMMANDS = {"generate": ["--prompt=Once"], "serve": ["--port=0"], "doctor": []}
DAILY = [
    ("generate", "config.json: nested 100,000 deep"),
    ("generate", "config.json: 10^7 layers"),
    ("serve", "model.safetensors: FIFO"),
    ("serve", "generation_config.json: temperature 3"),
    ("doctor", "tokenizer.json: newer model"),
    ("doctor", "model.safetensors: all NaN"),
    ("doctor", "tokenizer.json: post-processor that panics"),
]


@pytest.mark.process
@pytest.mark.parametrize(("command", "name"), DAILY)
def test_command_refuses_in_one_line(command: str, name: str, tmp_path: Path) -> None:
    arguments = command_line(command, name, tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert_refused(command, name, ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedCommands]:
    started = ForkedCommands()
    yield started
    started.close()


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", CASES)
def test_every_command_refuses_in_one_line(command: str, name: str, tmp_path: Path, forked: ForkedCommands) -> None:
    ended = forked.run(*command_line(command, name, tmp_path))
    assert_refused(command, name, ended.status, ended.stdout, ended.stderr)
    assert ended.cpu_s < LIMIT_S


def command_line(command: str, name: str, tmp_path: Path) -> list[str]:
    """Return the arguments of a command for the demo model with this damage."""
    folder = copy_of_demo(tmp_path / "model")
    CASES[name][0](folder)
    return [command, str(folder), *SMALL_FLAGS, *COMMANDS[command]]


def assert_refused(command: str, name: str, status: int, stdout: str, stderr: str) -> None:
    file = CASES[name][1]
    assert "Traceback" not in stderr
    if command == "doctor":
        assert status == 1, stdout
        lines = [line for line in stdout.splitlines() if line.startswith("fail")]
        assert any(file in line for line in lines), stdout
    else:
        assert status == 2, stderr
        error = stderr[stderr.index("error: ") :]
        assert len(error.splitlines()) == 1
        assert file in error
