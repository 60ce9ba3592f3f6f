"""The result of a check, and the run of a check that turns every error into a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from ...comm.message_text import first_line
from ...runtime.model.checkpoint import NotFetched
from ..errors import PlacementError, RankFailed

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check; `remedy` is the fix if something is wrong."""

    name: str
    status: Status
    finding: str
    remedy: str = ""

    def after(self, others: Iterable[Finding]) -> Finding:
        """Return the finding as it is printed after `others`: of a fault that one of them has, only their name."""
        for other in others:
            if self.status != "ok" and (self.finding, self.remedy) == (other.finding, other.remedy):
                return replace(self, finding=f"skipped: see {other.name}", remedy="")
        return self

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name}: {self.finding}" + (f"; {self.remedy}" if self.remedy else "")


# Findings without a name, which `run_check` adds. A failure keeps the ranks from starting, a warning does not.
ok = partial(Finding, "", "ok")
warn = partial(Finding, "", "warn")
fail = partial(Finding, "", "fail")


def run_check(name: str, check: Callable[[], Finding]) -> Finding:
    """Return the check's finding under its name; an error is a failure.

    Messages of lockstep's errors have the form `values, rule; fix`, and are split into finding and remedy.
    """
    try:
        return replace(check(), name=name)
    except NotFetched as error:
        finding, _, remedy = str(error).partition("; ")
        return Finding(name, "warn", finding, f"{remedy}, or wait while it is fetched at the start")
    except (ValueError, PlacementError, RankFailed) as error:
        finding, _, remedy = first_line(error).partition("; ")
        return Finding(name, "fail", finding, remedy)
    except Exception as error:  # noqa: BLE001 - the other checks must run, and the crash of this one is a finding
        return Finding(name, "fail", f"the check crashed: {type(error).__name__}: {first_line(error)}", "report it")
