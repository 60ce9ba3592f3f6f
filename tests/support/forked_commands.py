"""The `lockstep` command in forks of a process that has imported it: 800 starts of Python would take half an hour."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TIME_LIMIT_S = 60
# Answers each line, a list of arguments, with the status and the CPU seconds of the command and its child processes.
FORKER = """
import json, os, sys
from lockstep import LLM
from lockstep.launch.cli import main
for line in sys.stdin:
    arguments, stdout, stderr, limit_s = json.loads(line)
    pid = os.fork()
    if pid == 0:
        import signal
        os.setsid()
        signal.alarm(limit_s)
        for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))
        sys.argv = ["lockstep", *arguments]
        try:
            main.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status, usage = os.wait4(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)
"""


@dataclass(frozen=True)
class EndedCommand:
    """The output of a command, its exit status, and its CPU time with that of its child processes."""

    status: int
    cpu_s: float
    stdout: str
    stderr: str


class ForkedCommands:
    """A process that runs one command after another; call `close`."""

    def __init__(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, *arguments: str) -> EndedCommand:
        """Run `lockstep` with these arguments."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
            self._process.stdin.write(json.dumps([arguments, str(stdout), str(stderr), TIME_LIMIT_S]) + "\n")
            self._process.stdin.flush()
            readable, _, _ = select.select([self._process.stdout], [], [], 2 * TIME_LIMIT_S)
            assert readable, f"lockstep {' '.join(arguments)} has not ended within {2 * TIME_LIMIT_S} s"
            status, cpu_s = json.loads(self._process.stdout.readline())
            return EndedCommand(status, cpu_s, stdout.read_text(), stderr.read_text())

    def close(self) -> None:
        self._process.communicate(timeout=TIME_LIMIT_S)
