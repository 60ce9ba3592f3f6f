"""Draw docs/benchmarks.svg from the tables in scripts/results: lockstep beside vLLM and mini-sglang.

python scripts/plot_benchmarks.py [OUTPUT]      # needs matplotlib: pip install -e '.[plot]'
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts" / "results"
ENGINES = {"lockstep": "#1f6feb", "vLLM 0.22": "#f0a030", "mini-sglang": "#9aa4ad"}
ONE_GPU = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-14B")
LLAMA = {"8B, TP=1": ("Llama-3.1-8B", "1"), "8B, TP=2": ("Llama-3.1-8B", "2"), "8B, TP=4": ("Llama-3.1-8B", "4"),
         "70B, TP=4": ("Llama-3.1-70B", "4")}  # fmt: skip
Figures = dict[str, dict[str, dict[str, float]]]  # metric -> group of bars -> engine -> value


def table(path: Path, heading: str) -> Iterator[dict[str, str]]:
    """Yield the rows of the first table with the column `heading` first; an empty first cell repeats the last."""
    lines = iter(path.read_text().splitlines())
    header = next(line for line in lines if line.startswith(f"| {heading} |"))
    names = _cells(header)
    next(lines)
    above = dict.fromkeys(names, "")
    for line in lines:
        if not line.startswith("|"):
            return
        row = dict(zip(names, _cells(line), strict=True))
        if not row[heading]:
            row |= {name: above[name] for name in (heading, "TP") if name in row}
        above = row
        yield row


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip("|\n").split("|")]


def one_gpu() -> Figures:
    """Return the figures of one H200: decode_h200_202611.md."""
    figures: Figures = {"batch 1": {m: {} for m in ONE_GPU}, "nano, tok/s": {m: {} for m in ONE_GPU}}
    for row in table(RESULTS / "decode_h200_202611.md", "model"):
        _add(figures, row["model"], row)
    return figures


def tensor_parallel() -> Figures:
    """Return the figures of one to four H200s: tp4_h200x4_202611.md."""
    figures: Figures = {"batch 1": {g: {} for g in LLAMA}, "nano, tok/s": {g: {} for g in LLAMA}}
    groups = {key: group for group, key in LLAMA.items()}
    for row in table(RESULTS / "tp4_h200x4_202611.md", "model"):
        _add(figures, groups.get((row["model"], row["TP"]), ""), row)
    return figures


def _add(figures: Figures, group: str, row: dict[str, str]) -> None:
    engine = row[""]
    for metric, groups in figures.items():
        if group in groups and engine in ENGINES:
            groups[group][engine] = float(row[metric].replace(",", ""))


def draw(output: Path) -> None:
    """Write the four panels."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "lockstep", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False})  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 4.3), layout="constrained")
    for row, (title, figures) in zip(
        axes, (("one H200", one_gpu()), ("Llama-3.1 on H200s", tensor_parallel())), strict=True
    ):
        _bars(row[0], f"{title}: ms per token, batch 1 (lower is better)", figures["batch 1"])
        _bars(row[1], f"{title}: output tokens/s, nano (higher is better)", figures["nano, tok/s"])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(ENGINES), frameon=False)
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else {}, dpi=100)


def _bars(axis: Any, title: str, groups: dict[str, dict[str, float]]) -> None:
    engines = [engine for engine in ENGINES if any(engine in values for values in groups.values())]
    width = 0.8 / len(engines)
    for i, engine in enumerate(engines):
        places = [x for x, values in enumerate(groups.values()) if engine in values]
        heights = [values[engine] for values in groups.values() if engine in values]
        offset = (i - (len(engines) - 1) / 2) * width
        bars = axis.bar([x + offset for x in places], heights, width * 0.92, label=engine, color=ENGINES[engine])
        labels = [f"{height:,.0f}" if height >= 100 else f"{height:.2f}" for height in heights]
        axis.bar_label(bars, labels, fontsize=7.5, padding=1)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
    axis.set_title(title, fontsize=9.5)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "benchmarks.svg")
