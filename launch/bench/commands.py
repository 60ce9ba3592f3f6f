"""`lockstep bench`: latency and throughput under vLLM's names, and the time of the parts of a step."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from tqdm import tqdm

from ...runtime.config import Config
from ..options import LogLevel, start_logging, with_config
from .comm_command import bench_comm
from .engine_benchmark import EngineBenchmark, TimedRuns, report_steps, time_latency
from .output_files import require_outputs
from .scaling import Baseline, scaling_line
from .serve_command import MultiValueCommand, bench_serve
from .workload import Workload, batch, nano, uniform

app = typer.Typer(no_args_is_help=True, help="Measure a model, a server, or the ranks' collectives.")
app.command("serve", cls=MultiValueCommand)(bench_serve)
app.command("comm")(bench_comm)
BATCH_SIZE = 8
UNIFORM: dict[str, Any] = {
    "num_prompts": 1000, "input_len": 1024, "output_len": 128, "random_range_ratio": 0.0, "seed": 0,
}  # fmt: skip
NANO = {"num_prompts": 256, "seed": 0}  # --preset nano allows these values of the other options

OutputJson = Annotated[Path | None, typer.Option("--output-json", help="Write the results to this file.")]
BaselineFile = Annotated[
    Path | None,
    typer.Option("--baseline", help="--output-json of fewer ranks, same model and workload; print the scaling."),
]
TraceFile = Annotated[
    Path | None,
    typer.Option("--profile", help="Write a Chrome trace of rank 0, for ui.perfetto.dev; gzipped if it ends in .gz."),
]
TraceSteps = Annotated[int, typer.Option(min=1, help="Decode steps to trace, after everything has been timed.")]


@app.command("latency")
@with_config
def bench_latency(
    config: dict[str, Any],
    *,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of each output.")] = 128,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Prompts at once, {BATCH_SIZE} if not given; repeat for several.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Outputs for each prompt.")] = 1,
    num_iters_warmup: Annotated[int, typer.Option(min=0, help="Warm-up runs, which are not counted.")] = 10,
    num_iters: Annotated[int, typer.Option(min=1, help="Runs to time, and then as many with one output token.")] = 30,
    output_json: OutputJson = None,
    baseline: BaselineFile = None,
    profile: TraceFile = None,
    profile_steps: TraceSteps = 32,
    log_level: LogLevel = "info",
) -> None:
    """Time batches of equal requests, to their last token.

    ms per output token is (time of output-len tokens - time of 1) / (output-len - 1), of the medians.
    """
    start_logging(log_level)
    sizes = batch_size or [BATCH_SIZE]
    workloads = [batch(size, input_len, output_len, n) for size in sizes]
    shapes = [{"batch_size": size, "input_len": input_len, "output_len": output_len, "n": n} for size in sizes]
    _check_files(output_json, profile, workloads)
    engine_config, results = Config.from_options(config), []
    compared = Baseline(baseline, engine_config.model, shapes) if baseline else None
    with redirect_stdout(sys.stderr), EngineBenchmark(engine_config, workloads) as bench:
        requests = (num_iters_warmup + 2 * num_iters) * sum(w.num_requests for w in workloads)
        with tqdm(total=requests, unit="request", disable=None) as bar:
            timings = [time_latency(bench, w, warmup=num_iters_warmup, times=num_iters, bar=bar) for w in workloads]
        for size, shape, workload, (run, result) in zip(sizes, shapes, workloads, timings, strict=True):
            path = profile.with_name(f"batch-{size}-{profile.name}") if profile and len(sizes) > 1 else profile
            steps = _profile_steps(bench, workload, run, profile_steps, path)
            results.append(result | shape | steps)
    _report(results, compared, _latency_head, output_json)


@app.command("throughput")
@with_config
def bench_throughput(
    config: dict[str, Any],
    *,
    dataset_name: Annotated[
        Literal["random"], typer.Option(help="Source of the lengths: each uniform in len * (1 -/+ ratio), as in vLLM.")
    ] = "random",
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Requests, 1000 if not given.")] = None,
    input_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt, 1024 if not given.")] = None,
    output_len: Annotated[int | None, typer.Option(min=1, help="Tokens of an output, 128 if not given.")] = None,
    random_range_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, help="Ratio of the range of lengths, 0 if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of lengths and prompts, 0 if not given.")] = None,
    preset: Annotated[
        Literal["nano"] | None,
        typer.Option(help="nano: 256 prompts, inputs and outputs of 100 to 1024 tokens, temperature 0.6."),
    ] = None,
    output_json: OutputJson = None,
    baseline: BaselineFile = None,
    profile: TraceFile = None,
    profile_steps: TraceSteps = 32,
    log_level: LogLevel = "info",
) -> None:
    """Submit all requests at once and time them together.

    No request stops before its last token.
    """
    start_logging(log_level)
    flags = {
        "num_prompts": num_prompts, "input_len": input_len, "output_len": output_len,
        "random_range_ratio": random_range_ratio, "seed": seed,
    }  # fmt: skip
    flags = {name: value for name, value in flags.items() if value is not None}
    lengths = UNIFORM | flags
    workload = _preset(flags) if preset is not None else uniform(**lengths)
    _check_files(output_json, profile, [workload])
    shape = {"preset": preset} if preset is not None else {"dataset_name": dataset_name, **lengths}
    engine_config = Config.from_options(config)
    compared = Baseline(baseline, engine_config.model, [shape]) if baseline else None
    with redirect_stdout(sys.stderr), EngineBenchmark(engine_config, [workload], seed or 0) as bench:
        bench.run(batch(1, workload.input_lens[0], 1))  # warm-up: initializes everything that is made on first use
        with tqdm(total=workload.num_requests, unit="request", disable=None) as bar:
            run = bench.run(workload, bar=bar)
        steps = _profile_steps(bench, workload, run, profile_steps, profile)
    _report([_throughput_result(workload, run) | shape | steps], compared, _throughput_head, output_json)


def _report(
    results: list[dict[str, Any]],
    baseline: Baseline | None,
    head: Callable[[dict[str, Any]], Iterator[str]],
    output_json: Path | None,
) -> None:
    """Print the results, and their scaling against the baseline, and write them to `output_json`."""
    if baseline is not None:
        results = [result | scaling for result, scaling in zip(results, baseline.compare(results), strict=True)]
    for result in results:
        print(*head(result), *_step_lines(result), sep="\n")
    if output_json is not None:
        output_json.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")


def _throughput_result(workload: Workload, run: TimedRuns) -> dict[str, Any]:
    """Return the result under vLLM's keys."""
    seconds = sum(run.seconds)
    tokens = sum(workload.input_lens) + run.stats.output_tokens
    return {
        "elapsed_time": seconds,
        "num_requests": workload.num_requests,
        "total_num_tokens": tokens,
        "requests_per_second": workload.num_requests / seconds,
        "tokens_per_second": tokens / seconds,
    }


def _preset(flags: dict[str, Any]) -> Workload:
    for name, value in flags.items():
        if value != NANO.get(name):
            raise ValueError(f"--preset nano fixes lengths and seed; drop --{name.replace('_', '-')} {value}")
    return nano()


def _profile_steps(
    bench: EngineBenchmark, workload: Workload, run: TimedRuns, num_steps: int, path: Path | None
) -> dict[str, Any]:
    """Profile the workload, write the trace to `path` if it is not None, and report metadata and the run's steps."""
    import torch

    profile = bench.profile(workload, num_steps)
    if path is not None:
        path.write_bytes(gzip.compress(profile.trace) if path.suffix == ".gz" else profile.trace)
    return {
        "model": bench.config.model,
        "tensor_parallel_size": bench.config.tensor_parallel_size,
        "torch": torch.__version__,
        "startup_s": bench.executor.startup,
        **report_steps(run, profile),
    }


def _latency_head(result: dict[str, Any]) -> Iterator[str]:
    yield f"Batch size: {result['batch_size']}"
    yield f"Avg latency: {result['avg_latency']} seconds"
    yield from (f"{p}% percentile latency: {seconds} seconds" for p, seconds in result["percentiles"].items())
    if result["ms_per_output_token"] is not None:
        yield f"Time per output token: {result['ms_per_output_token']:.3f} ms"


def _throughput_head(result: dict[str, Any]) -> Iterator[str]:
    yield (
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} total tokens/s,"
        f" {result['output_tokens_per_second']:.2f} output tokens/s"
    )


def _step_lines(r: dict[str, Any]) -> Iterator[str]:
    """Yield the human-readable report of the steps."""
    yield (
        f"Steps: {r['prefill_steps']} prefill, {r['decode_steps']} decode, {r['preemptions']} preemptions;"
        f" {r['prompt_tokens']} prompt tokens computed, {r['output_tokens']} output tokens,"
        f" {r['output_tokens_per_second']:.1f} a second"
    )
    phases = ", ".join(f"{p} {r[f'{p}_us_per_step']:.0f}" for p in ("schedule", "launch", "commit", "wait"))
    yield f"Host: {r['host_us_per_step']:.0f} us a step ({phases})"
    if r["decode_steps"]:
        yield (
            f"Decode step: {r['ms_per_decode_step']:.3f} ms, reads {r['weight_bytes_per_decode_step'] / 1e9:.3g} GB of"
            f" weights and {r['kv_bytes_per_decode_step'] / 1e9:.3g} GB of KV: {r['achieved_gb_per_second']:.1f} GB/s,"
            f" {r['share_of_copy']:.1%} of a copy's {r['copy_gb_per_second']:.1f} GB/s"
        )
    if r["profiled_steps"] and not r["kernel_shares"]:
        yield "Profile: the trace has no kernels; they are recorded through CUPTI, which one program at a time can use"
    elif r["profiled_steps"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in r["kernel_shares"].items())
        alone = f", communication alone {r['exposed_communication_share']:.1%}" if r["tensor_parallel_size"] > 1 else ""
        yield (
            f"Profile of {r['profiled_steps']} decode steps: busy for {r['busy_ms_per_decode_step']:.3f} ms a step,"
            f" idle {r['idle_share']:.1%}{alone}; {shares}"
        )
    if "speedup" in r:
        yield scaling_line(r)
    ready_s = r["startup_s"]["ready"]
    yield f"Ready: after {ready_s:.1f} s, {r['device']}, tensor_parallel_size={r['tensor_parallel_size']}"


def _check_files(output_json: Path | None, profile: Path | None, workloads: list[Workload]) -> None:
    """Raise ValueError for files that could not be written after minutes of measurement."""
    require_outputs(output_json, profile)
    if profile is not None and all(max(w.output_lens) == 1 for w in workloads):
        raise ValueError("--profile traces decode steps, and outputs of 1 token have none; raise --output-len")
