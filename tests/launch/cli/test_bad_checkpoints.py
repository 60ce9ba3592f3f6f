"""Checkpoints that cannot be used: one line that names the file, within seconds, and no traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from bad_checkpoints import CASES, copy_of_demo

from lockstep import LLM

from small import SMALL

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
