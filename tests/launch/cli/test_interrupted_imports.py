"""Ctrl-C and SIGTERM while a command imports its libraries: it ends without a traceback, also if they are repeated.

The process sends itself signals at the import of a module, so that the moment does not depend on the machine.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
modules, number = set(sys.argv.pop(1).split(",")), int(sys.argv.pop(1))
def send(event, arguments):
    if event == "import" and arguments[0] in modules:
        modules.remove(arguments[0])
        os.kill(os.getpid(), number)
sys.addaudithook(send)
from lockstep.launch.cli.entry import main
main()
"""
EARLY = ("typer", "numpy", "lockstep.launch.cli.main")  # before the command begins
LATE = ("torch", "torch._C", "torch.nn", "transformers")
BATCH = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2000}}\n'
COMMANDS = {
    "doctor": ["doctor"],
    "generate": ["generate", "--prompt=a"],
    "serve": ["serve", "--port=0"],
    "chat": ["chat"],
    "bench": ["bench", "latency"],
    "run-batch": ["run-batch", "--input-file=in.jsonl", "--output-file=out.jsonl"],
}


def interrupt(folder: Path, command: str, modules: str, number: signal.Signals) -> None:
    (folder / "in.jsonl").write_text(BATCH)
    program = [sys.executable, "-c", PROGRAM, modules, str(int(number)), *COMMANDS[command], "--device=cpu"]
    ended = subprocess.run(program, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert ended.returncode in (-number, 128 + number), ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


@pytest.mark.parametrize("module", EARLY)
def test_early_import(tmp_path: Path, module: str) -> None:
    interrupt(tmp_path, "doctor", module, signal.SIGINT)


@pytest.mark.process
def test_repeated_signals_during_the_import_of_torch(tmp_path: Path) -> None:
    interrupt(tmp_path, "doctor", ",".join(LATE), signal.SIGINT)


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("modules", [*EARLY, *LATE, ",".join(LATE)])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(tmp_path: Path, command: str, modules: str, number: signal.Signals) -> None:
    interrupt(tmp_path, command, modules, number)
