"""`lockstep bench comm`: all-reduces between the ranks, in nccl-tests' columns."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ...runtime.config import Config
from ..cluster.ray_starter import start_ray_ahead
from ..options import LogLevel, start_logging, with_fields
from ..signals import Undo, signals_wait
from .comm_report import ALGORITHMS, AlgorithmTimings, CommBenchSpec, CommReport, draw, lines, summary
from .output_files import require_outputs

if TYPE_CHECKING:
    from .comm_actor import CommBenchActor

GROUP_OPTIONS = (
    "tensor_parallel_size", "device", "gpus_per_rank", "nccl_library", "ray_address", "startup_timeout",
    "wait_for_resources", "step_timeout",
)  # fmt: skip
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # dtype -> bytes of an element


@with_fields("options", Config, GROUP_OPTIONS)
def bench_comm(
    options: dict[str, Any],
    *,
    min_bytes: Annotated[str, typer.Option("--min-bytes", "-b", help="Smallest size, as 8, 4K or 1M.")] = "1K",
    max_bytes: Annotated[str, typer.Option("--max-bytes", "-e", help="Largest size.")] = "16M",
    step_factor: Annotated[int, typer.Option("--step-factor", "-f", min=2, help="Factor from a size to the next.")] = 2,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}.")] = "bfloat16",
    hidden_size: Annotated[
        int, typer.Option(min=1, help="Columns of the rows of all-reduce + residual + RMSNorm.")
    ] = 4096,
    algorithm: Annotated[
        list[str] | None, typer.Option(help="Algorithm to measure; repeat for several. All that can run if not given.")
    ] = None,
    iters: Annotated[int, typer.Option("--iters", "-n", min=1, help="Collectives to time, one after another.")] = 20,
    warmup_iters: Annotated[
        int, typer.Option("--warmup-iters", "-w", min=0, help="Warm-up collectives before them.")
    ] = 5,
    graph_length: Annotated[int, typer.Option(min=1, help="Collectives in a CUDA graph.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False,
    output_json: Annotated[Path | None, typer.Option(help="Write that object to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency by size into this PNG; needs matplotlib (lockstep[plot]).")
    ] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Check and time all-reduces between ranks.

    The ranks are started as for a model. Status 1 if a result is wrong.

    Times are those of the slowest rank. "In place" has the meaning of nccl-tests if an algorithm can do that. For
    algorithms that read their input from peer buffers it means that the input is there already.
    """
    start_logging(log_level)
    config = Config.from_options(options)
    sizes = list(byte_sizes(min_bytes, max_bytes, step_factor, dtype))
    _check(config, algorithm or [])
    require_outputs(output_json, plot=plot)
    spec = CommBenchSpec(
        sizes=sizes, dtype=dtype, hidden_size=hidden_size, algorithms=algorithm or [], warmup=warmup_iters,
        times=iters, graph_length=graph_length,
    )  # fmt: skip
    tables = io.StringIO() if as_json else sys.stdout
    with redirect_stdout(sys.stderr), start_ray_ahead(config):
        with signals_wait():  # imports torch, which takes seconds: a wrong option is refused before
            from .comm_actor import CommBenchActor

        report = run_on_ranks(CommBenchActor, config, spec, tables)
    if as_json:
        print(report.json())
    if output_json is not None:
        output_json.write_text(report.json() + "\n")
    if plot is not None:
        draw(report, plot)
    if report.num_wrong:
        raise typer.Exit(1)


def run_on_ranks(actor: type[CommBenchActor], config: Config, spec: CommBenchSpec, out: TextIO) -> CommReport:
    """Start an actor for each rank and measure; prints each block to `out` when it is complete."""
    from ray.util.placement_group import remove_placement_group

    with signals_wait():
        from ..cluster.connection import Connection
    from ..cluster.actor_group import ActorGroup
    from ..cluster.placement import place

    with Undo() as stack:
        connection = stack.enter_context(closing(Connection(config)))
        placed = replace(config.placed(cuda=connection.has_gpus), all_reduce="nccl")  # the actors add the others
        placement_group = place(placed, connection)
        stack.callback(connection.while_usable, remove_placement_group, placement_group)
        ranks = ActorGroup(placed, placement_group, connection, actor)
        stack.callback(ranks.close, 0)

        def call(method: str, *arguments: Any) -> list[Any]:
            return ranks.call(method, time.perf_counter() + config.startup_timeout, *arguments)

        ranks.endpoints = call("bind", connection.ip)
        capabilities = call("prepare", ranks.endpoints, spec)[0]
        report = CommReport(capabilities, spec, [str(endpoint) for endpoint in ranks.endpoints])
        print(*report.head(), sep="\n", file=out, flush=True)
        for name, modes in capabilities.modes.items():
            for mode in modes:
                block = AlgorithmTimings.from_ranks(name, mode, spec.dtype, call("measure", name, mode))
                report.blocks.append(block)
                print(*lines(block), sep="\n", file=out, flush=True)
        call("close")
    print(*summary(report), sep="\n", file=out, flush=True)
    return report


def byte_sizes(smallest: str, largest: str, factor: int, dtype: str) -> Iterator[int]:
    """Yield the sizes in bytes, rounded down to whole elements."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    size, stop = parse_bytes("min_bytes", smallest), parse_bytes("max_bytes", largest)
    if size > stop:
        raise ValueError(f"min_bytes={smallest} is above max_bytes={largest}")
    if size < DTYPES[dtype]:
        raise ValueError(f"min_bytes={smallest} holds no {dtype}, which has {DTYPES[dtype]} bytes")
    while size <= stop:
        yield size // DTYPES[dtype] * DTYPES[dtype]
        size *= factor


def parse_bytes(name: str, text: str) -> int:
    """Return the number of bytes that an option gives: '8' -> 8, '4K' -> 4096."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isdigit() or unit not in UNITS:
        raise ValueError(f"{name}={text!r} is no number of bytes; write 8, 4K, 1M or 1G")
    return int(number) * UNITS[unit]


def _check(config: Config, algorithms: list[str]) -> None:
    """Raise ValueError for options that would otherwise fail only when the ranks run."""
    if config.tensor_parallel_size < 2:
        raise ValueError("one rank has no peer to communicate with; give --tp 2 or more")
    config.placed(cuda=True)  # raises ValueError if an option does not fit config.device
    for name in algorithms:
        if name not in ALGORITHMS:
            raise ValueError(f"algorithm={name!r} is not one of {', '.join(ALGORITHMS)}")
