"""The results of `lockstep bench comm`: the tables of nccl-tests, one JSON object, a plot of latency by size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...runtime.version import __version__

if TYPE_CHECKING:
    from .comm_actor import CommBenchSpec, CommTiming, Mode, RankCapabilities, SizeTimings

NCCL_TESTS_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}
COLUMNS = ("time", "algbw", "busbw", "#wrong")


@dataclass(frozen=True)
class GroupTiming:
    """One collective: the time of the slowest rank, bandwidths in 10^9 bytes/s, and wrong elements on all ranks."""

    time_us: float
    algbw: float
    busbw: float  # algbw * 2 (n - 1) / n: the bytes that pass each rank's link
    wrong: int


@dataclass(frozen=True)
class TableLine:
    """The timings of one size."""

    size: int
    count: int
    out_of_place: GroupTiming | None
    in_place: GroupTiming | None

    @property
    def best_us(self) -> float | None:
        """The smaller of both times."""
        times = [cell.time_us for cell in (self.out_of_place, self.in_place) if cell is not None]
        return min(times, default=None)


@dataclass(frozen=True)
class Block:
    """The table of one algorithm, eager or in a graph."""

    algorithm: str
    mode: Mode
    type: str
    lines: list[TableLine]

    @classmethod
    def merged(
        cls, name: str, mode: Mode, spec: CommBenchSpec, ranks: Sequence[Sequence[SizeTimings]], size: int
    ) -> Block:
        """Merge the timings of all ranks."""
        table = []
        for timings in zip(*ranks, strict=True):
            nbytes = timings[0].nbytes
            both = ([timing.out_of_place for timing in timings], [timing.in_place for timing in timings])
            table.append(TableLine(nbytes, timings[0].count, *(_merge(cells, nbytes, size) for cells in both)))
        return cls(name, mode, NCCL_TESTS_TYPES[spec.dtype], table)


@dataclass
class Report:
    """All results; `blocks` grows during the benchmark."""

    capabilities: RankCapabilities
    spec: CommBenchSpec
    ranks: list[str]
    blocks: list[Block] = field(default_factory=list)

    @property
    def num_wrong(self) -> int:
        """Wrong elements in all results."""
        cells = (cell for b in self.blocks for line in b.lines for cell in (line.out_of_place, line.in_place) if cell)
        return sum(cell.wrong for cell in cells)

    def head(self) -> Iterator[str]:
        """Yield the lines above the first table."""
        yield f"# lockstep {__version__} bench comm, {len(self.ranks)} ranks, {self.capabilities.device}"
        yield f"# {self.capabilities.communication}"
        yield from (f"# {rank}" for rank in self.ranks)
        yield from (f"# no {name}: {reason}" for name, reason in self.capabilities.refused.items())

    def json(self) -> str:
        """Return the results as one JSON object."""
        import torch

        return json.dumps(
            {
                "lockstep": __version__,
                "torch": torch.__version__,
                "num_ranks": len(self.ranks),
                "ranks": self.ranks,
                "device": self.capabilities.device,
                "communication": self.capabilities.communication,
                "redop": "sum",
                **asdict(self.spec),
                "refused": self.capabilities.refused,
                "blocks": [asdict(block) for block in self.blocks],
            },
            indent=2,
        )


def lines(block: Block) -> Iterator[str]:
    """Yield the table of a block."""
    yield "#"
    yield f"# {block.algorithm}, {_mode_text(block.mode)}"
    yield f"#{'out-of-place':>71}{'in-place':>33}"
    cell = "{:>9}{:>8}{:>8}{:>8}".format
    yield "#{:>12}{:>14}{:>10}{:>7}".format("size", "count", "type", "redop") + 2 * cell(*COLUMNS)
    yield "#{:>12}{:>14}{:>10}{:>7}".format("(B)", "(elements)", "", "") + 2 * cell("(us)", "(GB/s)", "(GB/s)", "")
    for line in block.lines:
        row = f" {line.size:>12}{line.count:>14}{block.type:>10}{'sum':>7}"
        yield row + "".join(
            cell("N/A", "N/A", "N/A", "N/A")
            if c is None
            else cell(f"{c.time_us:.2f}", f"{c.algbw:.2f}", f"{c.busbw:.2f}", c.wrong)
            for c in (line.out_of_place, line.in_place)
        )


def summary(report: Report) -> Iterator[str]:
    """Yield the times of all algorithms by size, and the number of wrong elements."""
    modes: tuple[Mode, ...] = ("eager", "graph")
    for mode in modes:
        blocks = [block for block in report.blocks if block.mode == mode]
        if not blocks:
            continue
        yield "#"
        yield f"# us by size, {_mode_text(mode)}, the better of both columns"
        widths = [max(9, len(block.algorithm) + 2) for block in blocks]
        yield f"#{'size':>12}" + "".join(f"{b.algorithm:>{w}}" for b, w in zip(blocks, widths, strict=True))
        for rows in zip(*(block.lines for block in blocks), strict=True):
            times = ("N/A" if row.best_us is None else f"{row.best_us:.2f}" for row in rows)
            yield f" {rows[0].size:>12}" + "".join(f"{t:>{w}}" for t, w in zip(times, widths, strict=True))
    yield "#"
    yield f"# Out of bounds values : {report.num_wrong} {'FAILED' if report.num_wrong else 'OK'}"


def draw(report: Report, path: Path) -> None:
    """Draw the latency of every algorithm by size, with a panel for each mode."""
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
    figure.suptitle(f"all-reduce of {report.spec.dtype}, {len(report.ranks)} ranks, {report.capabilities.device}")
    figure.savefig(path, dpi=150)


def _mode_text(mode: Mode) -> str:
    return "in a CUDA graph" if mode == "graph" else "eager"


def _merge(cells: Sequence[CommTiming | None], nbytes: int, size: int) -> GroupTiming | None:
    timings = [cell for cell in cells if cell is not None]
    if len(timings) < len(cells):
        return None
    time_us = max(timing.us for timing in timings)
    algbw = nbytes / time_us / 1e3
    return GroupTiming(time_us, algbw, algbw * 2 * (size - 1) / size, sum(timing.wrong for timing in timings))
