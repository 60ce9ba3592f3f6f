"""The doctor's checks before the ranks start: a failed check refuses the start, a warning is logged.

The checks run in a child process, because a process that uses a GPU holds half a GiB of it until it ends. The child
process works while this one imports the server's libraries.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from contextlib import redirect_stdout

from ...runtime.config import Config
from ..child_process import ChildFailed, ChildProcess, calling
from ..cluster.ray_address import ray_address

log = logging.getLogger(__name__)
DEADLINE_S = 120.0  # a cluster's nodes have 60 s to answer


class Preflight(ChildProcess):
    """The checks, running in a child process; always call `close`."""

    def __init__(self, config: Config) -> None:
        ray_address(config)  # a wrong one is refused at once
        self._config = config
        super().__init__([*calling(print_findings), json.dumps(dataclasses.asdict(config))])

    def verify(self) -> None:
        """Wait for the findings and log the warnings; raises ValueError with every finding that fails."""
        findings = self._findings()
        if self._config.wait_for_resources is not None:  # nodes may join: the placement of the ranks decides later
            findings = [finding for finding in findings if finding["name"] != "devices"]
        for sentence in _sentences(findings, "warn"):
            log.warning("%s", sentence)
        failures = _sentences(findings, "fail")
        if failures:
            text = f": {failures[0]}" if len(failures) == 1 else "\n  ".join(["", *failures])
            raise ValueError(f"the start would fail (--no-preflight tries it anyway){text}")

    def _findings(self) -> list[dict[str, str]]:
        try:
            findings: list[dict[str, str]] = self.answer(DEADLINE_S)
        except TimeoutError as error:
            raise ValueError(
                f"the checks before the start have not ended within {DEADLINE_S:.0f} s; lockstep doctor shows which one"
                " hangs, --no-preflight starts without them"
            ) from error
        except ChildFailed as error:
            raise ValueError(
                f"the checks before the start failed: {error}; --no-preflight starts without them"
            ) from error
        return findings


def print_findings() -> None:
    """Run in the child process: print the findings as JSON."""
    from .diagnosis import diagnose

    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        findings = list(diagnose(Config.from_options(json.loads(sys.argv[1]))))
    print(json.dumps([dataclasses.asdict(finding) for finding in findings]), file=stdout)


def _sentences(findings: list[dict[str, str]], status: str) -> list[str]:
    """Return the findings of one status, human-readable; equal findings of several checks become one sentence."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        if finding["status"] == status:
            text = finding["finding"] + (f"; {finding['remedy']}" if finding["remedy"] else "")
            names.setdefault(text, []).append(finding["name"])
    return [f"{', '.join(checks)}: {text}" for text, checks in names.items()]
