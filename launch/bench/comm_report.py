"""What `lockstep bench comm` has measured: the tables of nccl-tests, one JSON object, a plot of latency by size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.version import __version__

if TYPE_CHECKING:
    from .comm_actor import CommBenchSpec, CommTiming, Mode, RankCapabilities, Row

TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}  # nccl-tests' names
CELL = ("time", "algbw", "busbw", "#wrong")


@dataclass(frozen=True)
class Timed:
    """One collective: the time of the slowest rank, 10^9 bytes a second, and wrong elements on all ranks."""

    time_us: float
    algbw: float
    busbw: float  # algbw * 2 (n - 1) / n: what passes each rank's link
    wrong: int


@dataclass(frozen=True)
class Line:
    """A row of a block."""

    size: int
    count: int
    out_of_place: Timed | None
    in_place: Timed | None

    @property
    def best_us(self) -> float | None:
        times = [cell.time_us for cell in (self.out_of_place, self.in_place) if cell is not None]
        return min(times, default=None)


@dataclass(frozen=True)
class Block:
    """One algorithm, eager or in a graph."""

    algorithm: str
    mode: Mode
    type: str
    lines: list[Line]

    @classmethod
    def merged(cls, name: str, mode: Mode, spec: CommBenchSpec, ranks: Sequence[Sequence[Row]], size: int) -> Block:
        """Out of what every rank has measured."""
        found = []
        for rows in zip(*ranks, strict=True):
            nbytes = rows[0].nbytes
            both = ([row.out_of_place for row in rows], [row.in_place for row in rows])
            found.append(Line(nbytes, rows[0].count, *(_merge(cells, nbytes, size) for cells in both)))
        return cls(name, mode, TYPES[spec.dtype], found)


@dataclass
class Report:
    """Everything; `blocks` grows."""

    found: RankCapabilities
    spec: CommBenchSpec
    ranks: list[str]
    blocks: list[Block] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        cells = (cell for b in self.blocks for line in b.lines for cell in (line.out_of_place, line.in_place) if cell)
        return sum(cell.wrong for cell in cells)

    def head(self) -> Iterator[str]:
        yield f"# lockstep {__version__} bench comm, {len(self.ranks)} ranks, {self.found.device}"
        yield f"# {self.found.communication}"
        yield from (f"# {rank}" for rank in self.ranks)
        yield from (f"# no {name}: {reason}" for name, reason in self.found.refused.items())

    def json(self) -> str:
        import torch

        return json.dumps(
            {
                "lockstep": __version__,
                "torch": torch.__version__,
                "num_ranks": len(self.ranks),
                "ranks": self.ranks,
                "device": self.found.device,
                "communication": self.found.communication,
                "redop": "sum",
                **asdict(self.spec),
                "refused": self.found.refused,
                "blocks": [asdict(block) for block in self.blocks],
            },
            indent=2,
        )


def lines(block: Block) -> Iterator[str]:
    """The table of a block."""
    where = "in a CUDA graph" if block.mode == "graph" else "eager"
    yield "#"
    yield f"# {block.algorithm}, {where}"
    yield f"#{'out-of-place':>71}{'in-place':>33}"
    cell = "{:>9}{:>8}{:>8}{:>8}".format
    yield "#{:>12}{:>14}{:>10}{:>7}".format("size", "count", "type", "redop") + 2 * cell(*CELL)
    yield "#{:>12}{:>14}{:>10}{:>7}".format("(B)", "(elements)", "", "") + 2 * cell("(us)", "(GB/s)", "(GB/s)", "")
    for line in block.lines:
        start = f" {line.size:>12}{line.count:>14}{block.type:>10}{'sum':>7}"
        yield start + "".join(
            cell("N/A", "N/A", "N/A", "N/A")
            if c is None
            else cell(f"{c.time_us:.2f}", f"{c.algbw:.2f}", f"{c.busbw:.2f}", c.wrong)
            for c in (line.out_of_place, line.in_place)
        )


def summary(report: Report) -> Iterator[str]:
    """Who is how fast at which size, and whether anything was wrong."""
    for mode in ("eager", "graph"):
        blocks = [block for block in report.blocks if block.mode == mode]
        if not blocks:
            continue
        yield "#"
        yield f"# us by size, {'in a CUDA graph' if mode == 'graph' else 'eager'}, the better of both columns"
        widths = [max(9, len(block.algorithm) + 2) for block in blocks]
        yield f"#{'size':>12}" + "".join(f"{b.algorithm:>{w}}" for b, w in zip(blocks, widths, strict=True))
        for rows in zip(*(block.lines for block in blocks), strict=True):
            times = ("N/A" if row.best_us is None else f"{row.best_us:.2f}" for row in rows)
            yield f" {rows[0].size:>12}" + "".join(f"{t:>{w}}" for t, w in zip(times, widths, strict=True))
    yield "#"
    yield f"# Out of bounds values : {report.num_wrong} {'FAILED' if report.num_wrong else 'OK'}"


def draw(report: Report, path: Path) -> None:
    """Latency by size of every algorithm, a panel for each mode."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(block.mode for block in report.blocks))
    figure = Figure(figsize=(7.0 * len(modes), 5.0), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        for block in (b for b in report.blocks if b.mode == mode):
            points = [(line.size, line.best_us) for line in block.lines if line.best_us is not None]
            style = "--" if "norm" in block.algorithm or "fused" in block.algorithm else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", label=block.algorithm)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="us", title=mode)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.suptitle(f"all-reduce of {report.spec.dtype}, {len(report.ranks)} ranks, {report.found.device}")
    figure.savefig(path, dpi=150)


def require_matplotlib() -> None:
    """Raises ValueError where it is not installed, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib") from error


def _merge(cells: Sequence[CommTiming | None], nbytes: int, size: int) -> Timed | None:
    found: list[Any] = [cell for cell in cells if cell is not None]
    if len(found) < len(cells):
        return None
    time_us = max(cell.us for cell in found)
    algbw = nbytes / time_us / 1e3
    return Timed(time_us, algbw, algbw * 2 * (size - 1) / size, sum(cell.wrong for cell in found))
