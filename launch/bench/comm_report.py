"""The options and results of `lockstep bench comm`: the tables of nccl-tests, one JSON object, a plot by size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from ...runtime.version import __version__

Mode = Literal["eager", "graph"]
MODE_TEXTS: dict[Mode, str] = {"eager": "eager", "graph": "in a CUDA graph"}
GEMM_ALGORITHMS = ("push after GEMM", "push by GEMM")  # with residual and norm, and the time of the GEMM
ALGORITHMS = (
    "push", "one-shot", "two-shot", "push fused", "one-shot fused", "two-shot fused", *GEMM_ALGORITHMS, "nccl",
    "nccl + norm", "gloo", "gloo + norm",
)  # fmt: skip
NCCL_TESTS_TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half"}


@dataclass(frozen=True, kw_only=True)
class CommBenchSpec:
    """The collectives to measure."""

    sizes: list[int]  # sizes in bytes
    dtype: str
    hidden_size: int  # columns of the residual stream
    algorithms: list[str]  # if empty, each one that fits the ranks' communicator
    warmup: int
    times: int
    graph_length: int


@dataclass(frozen=True)
class RankCapabilities:
    """The algorithms that a rank can run, with their modes, the reasons against the others, and its devices."""

    modes: dict[str, list[Mode]]
    refused: dict[str, str]
    device: str
    communication: str


@dataclass(frozen=True)
class Timing:
    """The time of one collective, its bandwidths in 10^9 bytes/s, and the wrong elements of its result."""

    time_us: float
    algbw: float
    busbw: float  # algbw * 2 (n - 1) / n, the traffic of each rank's link
    wrong: int

    @classmethod
    def from_time(cls, time_us: float, nbytes: int, num_ranks: int, wrong: int) -> Timing:
        algbw = nbytes / time_us / 1e3
        return cls(time_us, algbw, algbw * 2 * (num_ranks - 1) / num_ranks, wrong)


@dataclass(frozen=True)
class TableLine:
    """The timings of one size; None if the algorithm has no such collective."""

    size: int  # size in bytes
    count: int
    out_of_place: Timing | None
    in_place: Timing | None

    @property
    def best_us(self) -> float | None:
        """The smaller of both times."""
        times = [cell.time_us for cell in (self.out_of_place, self.in_place) if cell is not None]
        return min(times, default=None)


@dataclass(frozen=True)
class AlgorithmTimings:
    """The table of one algorithm, eager or in a graph."""

    algorithm: str
    mode: Mode
    type: str
    lines: list[TableLine]

    @classmethod
    def from_ranks(cls, name: str, mode: Mode, dtype: str, ranks: Sequence[Sequence[TableLine]]) -> AlgorithmTimings:
        """Merge the lines of all ranks."""
        table = []
        for lines in zip(*ranks, strict=True):
            columns = ([line.out_of_place for line in lines], [line.in_place for line in lines])
            table.append(TableLine(lines[0].size, lines[0].count, *map(_merge, columns)))
        return cls(name, mode, NCCL_TESTS_TYPES[dtype], table)


def _merge(ranks: Sequence[Timing | None]) -> Timing | None:
    """Return the timing of the slowest rank, with the wrong elements of all ranks."""
    timings = [timing for timing in ranks if timing is not None]
    if len(timings) < len(ranks):
        return None
    slowest = max(timings, key=lambda timing: timing.time_us)
    return replace(slowest, wrong=sum(timing.wrong for timing in timings))


@dataclass
class CommReport:
    """All results; `blocks` grows during the benchmark."""

    capabilities: RankCapabilities
    spec: CommBenchSpec
    ranks: list[str]
    blocks: list[AlgorithmTimings] = field(default_factory=list)

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


def lines(block: AlgorithmTimings) -> Iterator[str]:
    """Yield the table of a block."""
    yield "#"
    yield f"# {block.algorithm}, {MODE_TEXTS[block.mode]}"
    yield f"#{'out-of-place':>71}{'in-place':>33}"
    head, cell = "#{:>12}{:>14}{:>10}{:>7}".format, "{:>9}{:>8}{:>8}{:>8}".format
    yield head("size", "count", "type", "redop") + 2 * cell("time", "algbw", "busbw", "#wrong")
    yield head("(B)", "(elements)", "", "") + 2 * cell("(us)", "(GB/s)", "(GB/s)", "")
    for line in block.lines:
        row = f" {line.size:>12}{line.count:>14}{block.type:>10}{'sum':>7}"
        yield row + "".join(
            cell("N/A", "N/A", "N/A", "N/A")
            if c is None
            else cell(f"{c.time_us:.2f}", f"{c.algbw:.2f}", f"{c.busbw:.2f}", c.wrong)
            for c in (line.out_of_place, line.in_place)
        )


def summary(report: CommReport) -> Iterator[str]:
    """Yield the times of all algorithms by size, and the number of wrong elements."""
    for mode, text in MODE_TEXTS.items():
        blocks = [block for block in report.blocks if block.mode == mode]
        if not blocks:
            continue
        yield "#"
        yield f"# us by size, {text}, the better of both columns"
        widths = [max(9, len(block.algorithm) + 2) for block in blocks]
        yield f"#{'size':>12}" + "".join(f"{b.algorithm:>{w}}" for b, w in zip(blocks, widths, strict=True))
        for rows in zip(*(block.lines for block in blocks), strict=True):
            times = ("N/A" if row.best_us is None else f"{row.best_us:.2f}" for row in rows)
            yield f" {rows[0].size:>12}" + "".join(f"{t:>{w}}" for t, w in zip(times, widths, strict=True))
    yield "#"
    yield f"# Out of bounds values : {report.num_wrong} {'FAILED' if report.num_wrong else 'OK'}"


def draw(report: CommReport, path: Path) -> None:
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
