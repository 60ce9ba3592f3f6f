"""Which algorithm adds up how many bytes: measured by the ranks when they meet, remembered for the next start.

What is timed is what a decode step does twice a layer, all-reduce + residual + RMSNorm, many times in a CUDA graph, by
each algorithm at each size. The slowest rank's time counts, and all ranks use one table, so they choose alike. A start
on the same GPUs finds the table again: the choice, and with it the last bits of bfloat16 sums, does not change then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels.native import cache_dir
from .base import Communicator
from .timing import graph_us

log = logging.getLogger(__name__)
Algorithm = Literal["nccl", "one-shot", "two-shot"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
COLUMNS = 4096  # of the stream that is timed, bfloat16
SIZES = [8192 << shift for shift in range(0, 11, 2)]  # bytes: 8 KiB to 8 MiB
LENGTH, TIMES = 10, 3  # of the graph, and its replays
EPS = 1e-5
VERSION = 1  # raise it when a kernel changes: what was remembered is then forgotten
Exchange = Callable[[str, str], list[str]]


@dataclass(frozen=True)
class Table:
    """Microseconds of each algorithm at each of `sizes`, on the slowest rank."""

    sizes: list[int]
    us: dict[Algorithm, list[float]]
    remembered: bool = False  # from an earlier start

    def best(self) -> list[tuple[int, Algorithm]]:
        """Up to how many bytes an algorithm serves, ascending, each the fastest at its size; NCCL beyond the last."""
        found: list[tuple[int, Algorithm]] = []
        for column, nbytes in enumerate(self.sizes):
            name = min(self.us, key=lambda algorithm: self.us[algorithm][column])
            if found and found[-1][1] == name:
                found.pop()
            found.append((nbytes, name))
        return found[:-1] if found and found[-1][1] == "nccl" else found

    def lines(self) -> list[str]:
        """For people; the best of each size has a star."""
        least = [min(column) for column in zip(*self.us.values(), strict=True)]
        head = f"all-reduce + norm, us{', of an earlier start' if self.remembered else ''}"
        rows = [f"{head:<42}" + "".join(f"{size_text(nbytes):>9}" for nbytes in self.sizes)]
        for name, values in self.us.items():
            cells = (f"{us:.1f}{'*' if us == best else ' '}" for us, best in zip(values, least, strict=True))
            rows.append(f"  {name:<40}" + "".join(f"{cell:>9}" for cell in cells))
        return rows


def autotune_all_reduce(groups: Mapping[Algorithm, Communicator], place: str, say: Exchange) -> Table:
    """The table of the ranks that call this together: an earlier one of rank 0, or measured now.

    groups  a communicator for each algorithm, which adds up by nothing else
    place   what the times depend on, besides the kernels: this rank's GPU and libraries
    say     takes a topic and this rank's word, and has the words of all ranks
    """
    rank = next(iter(groups.values())).rank
    key = json.dumps([VERSION, COLUMNS, SIZES, say("place", place)])
    file = cache_dir() / f"all-reduce-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    known = say("known", _load(file, key) if rank == 0 else "")[0]
    if known:
        return Table(**json.loads(known), remembered=True)
    started = time.perf_counter()
    every = [json.loads(word) for word in say("measured", json.dumps(_measure(groups)))]
    us = {name: [max(column) for column in zip(*(one[name] for one in every), strict=True)] for name in groups}
    table = Table(SIZES, us)
    if rank == 0:
        log.info("measured who adds up fastest in %.2f s, kept as %s", time.perf_counter() - started, file)
        _save(file, key, table)
    return table


def _measure(groups: Mapping[Algorithm, Communicator]) -> dict[Algorithm, list[float]]:
    found: dict[Algorithm, list[float]] = {name: [] for name in groups}
    for nbytes in SIZES:
        for name, comm in groups.items():
            call = _completion(comm, nbytes)
            call()  # loads kernels
            found[name].append(graph_us(comm, call, length=LENGTH, times=TIMES))
    return found


def _completion(comm: Communicator, nbytes: int) -> Callable[[], Tensor]:
    """The stream's completion, of `nbytes`; zeros stay zeros."""
    dtype, device = torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    rows = nbytes // dtype.itemsize // COLUMNS
    x, residual = torch.zeros(2, rows, COLUMNS, dtype=dtype, device=device)
    weight = torch.ones(COLUMNS, dtype=dtype, device=device)

    def call() -> Tensor:
        shared = comm.buffer(rows, COLUMNS, dtype)
        return comm.all_reduce_add_rms_norm(x if shared is None else shared, residual, weight, EPS)

    return call


def _load(file: Path, key: str) -> str:
    """What was remembered for this key; empty if nothing that can be read."""
    try:
        found = json.loads(file.read_text())
        return json.dumps(found["table"]) if found["key"] == key else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _save(file: Path, key: str, table: Table) -> None:
    """Whole or not at all; a folder that cannot be written costs a measurement at each start."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as scratch:
            json.dump({"key": key, "table": {"sizes": table.sizes, "us": table.us}}, scratch)
        os.replace(scratch.name, file)
    except OSError as error:
        log.warning("cannot remember who adds up fastest: %s", error)


def size_text(count: int) -> str:
    """8 KiB, 2 MiB."""
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
