"""The table of a group on a cluster: which rank runs where, and what of the environment it was given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .rank_actor import Endpoint

HEAD = ("rank", "node", "address", "interface", "GPU", "pid")


def roster(endpoints: Sequence[Endpoint], forwarded: Iterable[str]) -> str:
    """A line for each rank; of `forwarded` the names only, because values may be secrets."""
    rows = [(str(e.rank), e.host, e.ip, e.interface or "?", ",".join(e.gpus) or "none", str(e.pid)) for e in endpoints]
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (HEAD, *rows)]
    nodes = len({endpoint.host for endpoint in endpoints})
    title = f"{len(rows)} rank{'s' * (len(rows) > 1)} on {nodes} node{'s' * (nodes > 1)}"
    names = ", ".join(sorted(forwarded)) or "nothing"
    return "\n  ".join([title, *(line.rstrip() for line in lines), f"environment that they get from here: {names}"])
