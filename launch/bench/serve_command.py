"""`lockstep bench serve`: requests to any OpenAI-compatible server, reported as in vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm
from typer.core import TyperCommand

from ..options import LogLevel, start_logging, with_fields
from .output_files import require_in_folder
from .serve_config import ServeBenchConfig
from .serve_metrics import RequestRecord, details, samples, statistics, summary

log = logging.getLogger(__name__)
WIDTH = 50
SECTIONS = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


class MultiValueCommand(TyperCommand):
    """A command without arguments; some options take several values: `--goodput ttft:500 tpot:50`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_repeat_options(args, ("--goodput", "--metadata"))))


def _repeat_options(args: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """Repeat the option before each of its further values."""
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
    """Send requests to a server and time the tokens of the answers.

    A key in the environment variable OPENAI_API_KEY goes with them. TTFT, ITL and E2EL are timed chunk by chunk of the
    stream; TPOT is (E2EL - TTFT) / (output tokens - 1), tokens as the server counts them.
    """
    start_logging(log_level)
    config = ServeBenchConfig(**options)
    if config.save_result:
        require_in_folder(
            config.result_dir or Path(), config.result_filename or f"{config.label or config.backend}.json"
        )
    records, result = asyncio.run(measure(config, model))
    print("\n".join(report(result, config)))
    if failed := [record.error for record in records if record.error]:
        log.error("%d of %d requests failed; the first one: %s", len(failed), len(records), failed[0])
    if config.save_result:
        _save(result if config.save_detailed else {k: v for k, v in result.items() if k not in details([])}, config)
    if config.plot is not None:
        draw(samples(records), config.plot)
    if len(failed) == len(records):
        raise typer.Exit(1)


async def measure(config: ServeBenchConfig, model: str | None) -> tuple[list[RequestRecord], dict[str, Any]]:
    """Make the prompts, wait for the server, warm it up and time the requests; returns them with the result."""
    from ...runtime.tokenizer import Tokenizer
    from .datasets import make_prompts, needs_tokenizer
    from .load_client import arrivals, connect_to_server, send_all  # imports httpx, which would slow --help down

    async with connect_to_server(config, model) as target:
        model = target.common["model"]
        name = (config.tokenizer or model) if needs_tokenizer(config) else None
        if name is not None:
            log.info("tokenizer: %s", name)
        prompts = make_prompts(config, Tokenizer(Path(name)) if name is not None else None)
        if config.ready_check_timeout_sec and (error := (await target.send(prompts[0])).error):
            raise ValueError(f"{config.url} does not answer the first request: {error}")
        with tqdm(total=config.num_warmups, desc="warm-up", unit="request", disable=None, leave=False) as bar:
            warmups = [prompts[0]] * config.num_warmups
            await send_all(warmups, [0.0] * config.num_warmups, target.send, config.max_concurrency, bar)
        times = arrivals(len(prompts), config.request_rate, config.burstiness, config.seed)
        with tqdm(total=len(prompts), unit="request", disable=None) as bar:
            started = time.perf_counter()
            records = await send_all(prompts, times, target.send, config.max_concurrency, bar)
            duration = time.perf_counter() - started
    return records, _result(config, {"model_id": model, "tokenizer_id": name}, records, duration)


def _result(
    config: ServeBenchConfig, names: dict[str, Any], records: list[RequestRecord], duration: float
) -> dict[str, Any]:
    """Return the result under vLLM's keys."""
    result: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": config.backend,
        "label": config.label,
        **names,
        "num_prompts": config.num_prompts,
        **config.metadata_pairs,
        "request_rate": "inf" if math.isinf(config.request_rate) else config.request_rate,
        "burstiness": "inf" if math.isinf(config.burstiness) else config.burstiness,
        "max_concurrency": config.max_concurrency,
        **summary(records, duration, config.goodput_limits),
    }
    seconds = samples(records)
    for name in config.metrics:
        result |= statistics(name, seconds[name], config.percentiles)
    return result | details(records)


def report(result: dict[str, Any], config: ServeBenchConfig) -> Iterator[str]:
    """Yield the lines of the report, with vLLM's labels."""
    yield " Serving Benchmark Result ".center(WIDTH, "=")
    rows = {
        "Successful requests": result["completed"],
        "Failed requests": result["failed"],
        "Maximum request concurrency": config.max_concurrency,
        "Request rate configured (RPS)": None if math.isinf(config.request_rate) else config.request_rate,
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
    for name in config.metrics:
        yield SECTIONS[name].center(WIDTH, "-")
        for key in ("mean", "median", *(f"p{p:g}" for p in config.percentiles)):
            yield _row(f"{key.capitalize()} {name.upper()} (ms)", result[f"{key}_{name}_ms"])
    yield "=" * WIDTH


def _row(label: str, value: float) -> str:
    return f"{label + ':':<40} {value:<10}" if isinstance(value, int) else f"{label + ':':<40} {value:<10.2f}"


def draw(seconds: dict[str, list[float]], path: Path) -> None:
    """Draw the cumulative distributions of TTFT and ITL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("ttft", "itl"), strict=True):
        ms = np.sort(seconds[name]) * 1e3
        axes.step(ms, np.arange(1, len(ms) + 1) / max(1, len(ms)), where="post")
        axes.set(title=SECTIONS[name], xlabel="ms", ylabel="share", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def _save(result: dict[str, Any], config: ServeBenchConfig) -> None:
    concurrency = f"-concurrency{config.max_concurrency}" if config.max_concurrency else ""
    model = result["model_id"].rstrip("/").split("/")[-1]
    label = config.label or config.backend
    default_name = f"{label}-{config.request_rate}qps{concurrency}-{model}-{result['date']}.json"
    path = (config.result_dir or Path()) / (config.result_filename or default_name)
    path.write_text(json.dumps(result) + "\n")
    log.info("results: %s", path)
