"""Checkpoints that cannot be used: one line that names the file, within seconds, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from bad_checkpoints import CASES, copy_of_demo

from lockstep import LLM

from small import COMMAND, SMALL, SMALL_FLAGS

LIMIT_S = 5


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Raise TimeoutError after LIMIT_S seconds, also where the process waits for a file."""

    def expire(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"not refused within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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
NIGHTLY = [(command, name) for n, name in enumerate(CASES) for command in COMMANDS if n % 12 == 0]


@pytest.mark.process
@pytest.mark.parametrize(("command", "name"), DAILY)
def test_command_refuses_in_one_line(command: str, name: str, tmp_path: Path) -> None:
    _assert_refused(command, name, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize(("command", "name"), NIGHTLY)
def test_every_command_refuses_in_one_line(command: str, name: str, tmp_path: Path) -> None:
    _assert_refused(command, name, tmp_path)


def _assert_refused(command: str, name: str, tmp_path: Path) -> None:
    damage, file = CASES[name]
    folder = copy_of_demo(tmp_path / "model")
    damage(folder)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(
        [*COMMAND, command, str(folder), *SMALL_FLAGS, *COMMANDS[command]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert "Traceback" not in ended.stderr
    if command == "doctor":
        assert ended.returncode == 1
        lines = [line for line in ended.stdout.splitlines() if line.startswith("fail")]
        assert any(file in line for line in lines)
    else:
        assert ended.returncode == 2
        error = ended.stderr[ended.stderr.index("error: ") :]
        assert len(error.splitlines()) == 1
        assert file in error
