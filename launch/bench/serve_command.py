"""`lockstep bench serve`: a load on any OpenAI-compatible server, reported as vLLM does."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm
from typer.core import TyperCommand

from ..options import LogLevel, start_logging, with_fields
from .serve_config import ServeBenchConfig
from .serve_metrics import Record, details, samples, statistics, summary

log = logging.getLogger(__name__)
WIDTH = 50
SECTIONS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


class ManyValues(TyperCommand):
    """Takes `--goodput ttft:500 tpot:50` for two values: this command has no arguments that they could be."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeated(args, ("--goodput", "--metadata"))))


def _repeated(args: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """The option once more before each of its further values."""
    current, values = "", 0
    for arg in args:
        if arg.startswith("--"):
            current, values = arg, 0
        elif current in options:
            if values:
                yield current
            values += 1
        yield arg


@with_fields("options", ServeBenchConfig)
def bench_serve(
    options: dict[str, Any],
    *,
    model: Annotated[str | None, typer.Option(help="Model to ask for; the server's first one if not given.")] = None,
    log_level: LogLevel = "info",
) -> None:
    """Send requests to a server, at a rate or all at once, and time the tokens that come back.

    A key in the environment variable OPENAI_API_KEY goes with them. TTFT, ITL and E2EL are timed chunk by chunk of the
    stream; TPOT is (E2EL - TTFT) / (output tokens - 1), tokens as the server counts them.
    """
    start_logging(log_level)
    load = ServeBenchConfig(**options)
    if load.plot is not None:
        _require_matplotlib()
    run = asyncio.run(measure(load, model))
    result = run.result(load)
    print("\n".join(block(result, load)))
    if failed := [record.error for record in run.records if record.error]:
        log.error("%d of %d requests failed; the first one: %s", len(failed), len(run.records), failed[0])
    if load.save_result:
        _save(result if load.save_detailed else {k: v for k, v in result.items() if k not in details([])}, load)
    if load.plot is not None:
        draw(samples(run.records), load.plot)
    if len(failed) == len(run.records):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Run:
    """What was sent to which model, and what came back."""

    model: str
    tokenizer: str | None
    records: list[Record]
    duration: float

    def result(self, load: ServeBenchConfig) -> dict[str, Any]:
        """vLLM's keys."""
        found: dict[str, Any] = {
            "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
            "backend": load.backend,
            "label": load.label,
            "model_id": self.model,
            "tokenizer_id": self.tokenizer,
            "num_prompts": load.num_prompts,
            **load.notes,
            "request_rate": "inf" if math.isinf(load.request_rate) else load.request_rate,
            "burstiness": "inf" if math.isinf(load.burstiness) else load.burstiness,
            "max_concurrency": load.max_concurrency,
            **summary(self.records, self.duration, load.slo),
        }
        seconds = samples(self.records)
        for name in load.metrics:
            found |= statistics(name, seconds[name], load.percentiles)
        return found | details(self.records)


async def measure(load: ServeBenchConfig, model: str | None) -> Run:
    """Make the prompts, wait for the server, warm it up and time the requests."""
    from ...runtime.tokenizer import Tokenizer
    from .datasets import make_prompts, needs_tokenizer
    from .load_client import arrivals, connected, send_all  # httpx: part of a second that --help need not wait for

    async with connected(load, model) as target:
        model = target.common["model"]
        name = (load.tokenizer or model) if needs_tokenizer(load) else None
        if name is not None:
            log.info("tokenizer: %s", name)
        prompts = make_prompts(load, Tokenizer(Path(name)) if name is not None else None)
        if load.ready_check_timeout_sec and (error := (await target.ask(prompts[0])).error):
            raise ValueError(f"{load.url} does not answer the first request: {error}")
        with tqdm(total=load.num_warmups, desc="warm-up", unit="request", disable=None, leave=False) as bar:
            warmups = [prompts[0]] * load.num_warmups
            await send_all(warmups, [0.0] * load.num_warmups, target.ask, load.max_concurrency, bar)
        times = arrivals(len(prompts), load.request_rate, load.burstiness, load.seed)
        with tqdm(total=len(prompts), unit="request", disable=None) as bar:
            started = time.perf_counter()
            records = await send_all(prompts, times, target.ask, load.max_concurrency, bar)
            duration = time.perf_counter() - started
    return Run(model, name, records, duration)


def block(result: dict[str, Any], load: ServeBenchConfig) -> Iterator[str]:
    """What vLLM prints, label by label."""
    yield " Serving Benchmark Result ".center(WIDTH, "=")
    rows = {
        "Successful requests": result["completed"],
        "Failed requests": result["failed"],
        "Maximum request concurrency": load.max_concurrency,
        "Request rate configured (RPS)": None if math.isinf(load.request_rate) else load.request_rate,
        "Benchmark duration (s)": result["duration"],
        "Total input tokens": result["total_input_tokens"],
        "Total generated tokens": result["total_output_tokens"],
        "Request throughput (req/s)": result["request_throughput"],
        "Request goodput (req/s)": result["request_goodput"],
        "Output token throughput (tok/s)": result["output_throughput"],
        "Peak output token throughput (tok/s)": result["max_output_tokens_per_s"],
        "Peak concurrent requests": float(result["max_concurrent_requests"]),
        "Total token throughput (tok/s)": result["total_token_throughput"],
    }
    yield from (_row(label, value) for label, value in rows.items() if value is not None)
    for name in load.metrics:
        yield SECTIONS[name].center(WIDTH, "-")
        for key in ("mean", "median", *(f"p{p:g}" for p in load.percentiles)):
            yield _row(f"{key.capitalize()} {name.upper()} (ms)", result[f"{key}_{name}_ms"])
    yield "=" * WIDTH


def _row(label: str, value: float) -> str:
    return f"{label + ':':<40} {value:<10}" if isinstance(value, int) else f"{label + ':':<40} {value:<10.2f}"


def draw(seconds: dict[str, list[float]], path: Path) -> None:
    """The share of first tokens and of gaps that took no longer than so many milliseconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "itl"), strict=True):
        ms = np.sort(seconds[name]) * 1e3
        axes.step(ms, np.arange(1, len(ms) + 1) / max(1, len(ms)), where="post")
        axes.set(title=SECTIONS[name], xlabel="ms", ylabel="share", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install matplotlib") from error


def _save(result: dict[str, Any], load: ServeBenchConfig) -> None:
    concurrency = f"-concurrency{load.max_concurrency}" if load.max_concurrency else ""
    model = result["model_id"].rstrip("/").split("/")[-1]
    named = f"{load.label or load.backend}-{load.request_rate}qps{concurrency}-{model}-{result['date']}.json"
    folder = load.result_dir or Path()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (load.result_filename or named)
    path.write_text(json.dumps(result) + "\n")
    log.info("results: %s", path)
