"""Limits of the steps of an engine: a stream cannot end before the event that a test needs has happened."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.plan import StepOutput


@contextmanager
def steps_limited(engine: AsyncEngine, num_steps: int) -> Iterator[None]:
    """Let an engine of this process run at most `num_steps` steps within the block; requests come and are cancelled."""
    executor = engine._engine.frontend.executor
    poll, steps_left = executor.poll, num_steps

    def limited(timeout_s: float) -> list[StepOutput]:
        nonlocal steps_left
        if steps_left == 0:
            time.sleep(0.002)  # the engine's thread asks again
            return []
        outputs = poll(timeout_s)
        steps_left -= len(outputs)
        return outputs

    executor.poll = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        executor.poll = poll  # type: ignore[method-assign]


class StepGate:
    """A limit of the steps in a process that was started with `command`, which runs its rank itself."""

    def __init__(self, file: Path) -> None:
        self._file = file
        program = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
        program += f"import step_gate; step_gate.limit_steps_by({str(file)!r})\n"
        self.command = [sys.executable, "-u", "-c", f"{program}from lockstep.launch.cli.main import main; main()"]

    def limit(self, num_steps: int) -> None:
        """Let the process run no more than `num_steps` steps from the first limit on, until `open`."""
        self._file.write_text(str(num_steps))

    def open(self) -> None:
        self._file.unlink(missing_ok=True)


def limit_steps_by(file: str) -> None:
    """Limit the steps of this process by a StepGate's file."""
    poll, num_steps = LocalExecutor.poll, 0

    def limited(self: LocalExecutor, timeout_s: float) -> list[StepOutput]:
        nonlocal num_steps
        try:
            limit = float(Path(file).read_text() or 0)
        except FileNotFoundError:
            limit, num_steps = math.inf, 0
        if num_steps >= limit:
            time.sleep(0.002)
            return []
        outputs = poll(self, timeout_s)
        num_steps += len(outputs)
        return outputs

    LocalExecutor.poll = limited  # type: ignore[method-assign]
