"""The doctor's checks before the ranks start: what fails refuses the start, what warns is logged.

They run in a process of their own: looking at a GPU takes half a GiB of it for as long as the process lives. It works
while this one imports what the server needs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING

from ...runtime.config import Config

if TYPE_CHECKING:
    from .checks import Finding

log = logging.getLogger(__name__)
PROGRAM = "from lockstep.launch.doctor.preflight import examine; examine()"
DEADLINE_S = 120.0  # a cluster's nodes have 60 s to answer


class Preflight:
    """The checks on their way; call `close` in any case."""

    def __init__(self, config: Config) -> None:
        self._config = config
        asked = json.dumps(dataclasses.asdict(config))
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, asked],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # Ctrl-C is for us; with it, all that the checks have started can be ended
        )  # fmt: skip

    def judge(self) -> None:
        """Wait for the findings and log the warnings; raises ValueError with all that would keep the ranks away."""
        findings = self._findings()
        if self._config.wait_for_resources is not None:  # nodes may join: whoever places the ranks will know
            findings = [finding for finding in findings if finding["name"] != "devices"]
        for sentence in _sentences(findings, "warn"):
            log.warning("%s", sentence)
        wrong = _sentences(findings, "fail")
        if wrong:
            raise ValueError("the start would fail (--no-preflight tries it anyway)\n  " + "\n  ".join(wrong))

    def close(self) -> None:
        """End what is still running."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _findings(self) -> list[dict[str, str]]:
        try:
            out, err = self._process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"the checks before the start have not ended within {DEADLINE_S:.0f} s; lockstep doctor shows which one"
                " hangs, --no-preflight starts without them"
            ) from error
        if self._process.returncode:
            reason = (err.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the checks before the start failed: {reason}; --no-preflight starts without them")
        found: list[dict[str, str]] = json.loads(out)
        return found


def examine() -> None:
    """The process: print the findings as JSON."""
    from .diagnosis import diagnose

    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        findings: list[Finding] = list(diagnose(Config.from_options(json.loads(sys.argv[1]))))
    print(json.dumps([dataclasses.asdict(finding) for finding in findings]), file=stdout)


def _sentences(findings: list[dict[str, str]], status: str) -> list[str]:
    """Those of this status; what several checks have found alike is said once."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        if finding["status"] == status:
            said = finding["finding"] + (f"; {finding['remedy']}" if finding["remedy"] else "")
            names.setdefault(said, []).append(finding["name"])
    return [f"{', '.join(found)}: {said}" for said, found in names.items()]
