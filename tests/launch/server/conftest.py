"""Servers over a scripted engine: one that is shared, and those with options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.server import refusal_pacing
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

from fake_engine import FakeService, Running


@pytest.fixture(autouse=True)
def refusals_per_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of refusals to one address, which is above that of the tests."""
    monkeypatch.setattr(refusal_pacing, "REFUSALS_PER_S", 1_000_000)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(Path(DEMO_MODEL))


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    running = Running(FakeService(tokenizer))
    yield running
    running.close()


@pytest.fixture
def run(tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """A function that starts a server with the given options; it is closed after the test."""
    started: list[Running] = []

    def start(**options: Any) -> Running:
        started.append(Running(FakeService(tokenizer), **options))
        return started[-1]

    yield start
    for running in started:
        running.close()
