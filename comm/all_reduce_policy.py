"""The policy of all-reduces between GPUs: the algorithm for each message size, and its choice by auto-tuning.

The ranks time each algorithm at each size once, and cache the times for later starts. The timed operation is all-reduce
+ residual + RMSNorm, which a decode step runs twice a layer. Each algorithm runs many times in a CUDA graph. The
slowest rank's time counts, and all ranks use one table, so they choose alike. A later start on the same GPUs reads the
cached table: the choice does not change then, nor do the last bits of bfloat16 sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.native import cache_dir
from .all_reduce_names import ALL_REDUCE_ALGORITHMS, AllReduceAlgorithm, AllReduceChoice
from .base import Communicator
from .message_text import format_bytes
from .rendezvous import Rendezvous
from .timing import graph_us, wait_for_imports

log = logging.getLogger(__name__)
COLUMNS = 4096  # columns of the timed residual stream, bfloat16
SIZES = [8192 << shift for shift in (0, 2, 3, 4, 5, 6, 8, 10, 12, 13)]  # bytes: 8 KiB to 64 MiB
GRAPH_LENGTH, REPLAYS, ROUNDS = 10, 3, 3
EPS = 1e-5
VERSION = 5  # raise it when a kernel or its timing changes: cached times are then ignored
SUMMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the kernels over peer buffers sum these
GATHER_BYTES = 1 << 20  # an all-gather of at most this size per rank goes through peer buffers
PUSH_BYTES = 256 << 10  # the largest message that is pushed: PUSH_BYTES of peer_protocol.cuh
GEMM_BYTES = 128 << 10  # the largest sum that GEMMs push: 8 rows of 8,192 columns
ADDED_ONCE: tuple[AllReduceAlgorithm, ...] = ("push", "one-shot")  # their sums have the bits of those that GEMMs push
MAX_GEMM_ROWS = 8  # the most rows of a GEMM that pushes: ROWS of skinny_gemm.cu
BUFFER_BYTES = SIZES[-1]  # the largest message in a peer buffer
LARGEST: dict[AllReduceAlgorithm, int] = dict.fromkeys(ALL_REDUCE_ALGORITHMS, BUFFER_BYTES) | {"push": PUSH_BYTES}


@dataclass(frozen=True)
class AllReducePolicy:
    """The algorithm for each message size; the same on all ranks."""

    # (largest size in bytes, algorithm), ascending; NCCL serves messages beyond the last.
    steps: tuple[tuple[int, AllReduceAlgorithm], ...]
    gather_bytes: int = GATHER_BYTES
    slices: bool = False  # larger messages go in slices of rows instead of to NCCL
    gemm_bytes: int = 0  # the largest sum that GEMMs push where push or one-shot serves it

    @classmethod
    def only(cls, algorithm: AllReduceAlgorithm, largest: int = BUFFER_BYTES) -> AllReducePolicy:
        """Return the policy that uses one algorithm up to `largest` bytes, or up to what it can do."""
        gemm_bytes = min(largest, GEMM_BYTES) if algorithm == "push" else 0
        steps = ((min(largest, LARGEST[algorithm]), algorithm),)
        return cls(steps, min(GATHER_BYTES, largest), gemm_bytes=gemm_bytes)

    @classmethod
    def auto(cls, table: AllReduceTimings) -> AllReducePolicy:
        """Return the policy of the fastest algorithms. If push is among the timed ones, GEMMs may push."""
        return cls(tuple(table.thresholds()), gemm_bytes=GEMM_BYTES if "push" in table.us else 0)

    @classmethod
    def batch_invariant(cls, choice: AllReduceChoice, ranks: int, largest: int = BUFFER_BYTES) -> AllReducePolicy:
        """Return the policy for sums with the same bits in any batch: in slices beyond `largest` bytes.

        Push and one-shot have the same bits; two-shot rounds once more. With two ranks one-shot is faster.
        """
        algorithm = choice if choice != "auto" else "push" if ranks == 2 else "two-shot"
        if algorithm != "push":
            return cls(((largest, algorithm),), min(GATHER_BYTES, largest), slices=True)
        return cls(((LARGEST["push"], "push"), (largest, "one-shot")), min(GATHER_BYTES, largest), slices=True)

    def algorithm(self, nbytes: int, dtype: torch.dtype) -> AllReduceAlgorithm:
        if nbytes == 0 or dtype not in SUMMED_DTYPES:
            return "nccl"
        return next((algorithm for largest, algorithm in self.steps if nbytes <= largest), "nccl")

    def lets_gemms_push(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        """Return whether a sum of GEMMs is pushed, with the bits of push and one-shot; equal on all ranks."""
        nbytes = rows * columns * dtype.itemsize
        fits = rows <= MAX_GEMM_ROWS and nbytes <= self.gemm_bytes and dtype.itemsize == 2
        return fits and self.algorithm(nbytes, dtype) in ADDED_ONCE

    def sliced(self, x: Tensor) -> list[Tensor]:
        """Return the rows of x in as many slices as the policy needs; the slices are views."""
        if not self.slices or x.nbytes <= self.steps[-1][0]:
            return [x]
        return list(x.split(self.steps[-1][0] // (x.nbytes // len(x))))

    def __str__(self) -> str:
        steps = [f"{algorithm} up to {format_bytes(largest)}" for largest, algorithm in self.steps]
        if self.slices:
            return ", ".join(steps) + ", and in slices beyond"
        largest = self._largest_of_gemms()
        gemms = f", GEMMs push up to {format_bytes(largest)}" if largest else ""
        return ", ".join(steps) + (" and NCCL beyond" if steps else "NCCL for sums") + gemms

    def _largest_of_gemms(self) -> int:
        """Return the largest sum in bytes that GEMMs push, or 0."""
        starts = [0, *(largest for largest, _ in self.steps)]
        pushed = (
            min(largest, self.gemm_bytes)
            for start, (largest, algorithm) in zip(starts, self.steps, strict=False)
            if algorithm in ADDED_ONCE and start < self.gemm_bytes
        )
        return max(pushed, default=0)


@dataclass(frozen=True)
class AllReduceTimings:
    """Microseconds of each algorithm at each of `sizes`, on the slowest rank; infinite where it does not work."""

    sizes: list[int]
    us: dict[AllReduceAlgorithm, list[float]]
    cached: bool = False  # True if the times are from an earlier start

    def thresholds(self) -> list[tuple[int, AllReduceAlgorithm]]:
        """Return (largest size in bytes, fastest algorithm) in ascending order; NCCL serves larger messages."""
        steps: list[tuple[int, AllReduceAlgorithm]] = []
        for column, nbytes in enumerate(self.sizes):
            fastest = min(self.us, key=lambda algorithm: self.us[algorithm][column])
            if steps and steps[-1][1] == fastest:
                steps.pop()
            steps.append((nbytes, fastest))
        return steps[:-1] if steps and steps[-1][1] == "nccl" else steps

    def without(self, algorithms: Collection[AllReduceAlgorithm]) -> AllReduceTimings:
        """Return the table of the other algorithms."""
        return replace(self, us={name: us for name, us in self.us.items() if name not in algorithms})

    def lines(self) -> list[str]:
        """Return the table in human-readable lines; the fastest algorithm of each size has a star."""
        least = [min(column) for column in zip(*self.us.values(), strict=True)]
        head = f"all-reduce + norm, us{', of an earlier start' if self.cached else ''}"
        rows = [f"{head:<42}" + "".join(f"{format_bytes(nbytes):>9}" for nbytes in self.sizes)]
        for name, values in self.us.items():
            cells = (_cell(us, us == best) for us, best in zip(values, least, strict=True))
            rows.append(f"  {name:<40}" + "".join(f"{cell:>9}" for cell in cells))
        return rows


def autotune_all_reduce(
    groups: Mapping[AllReduceAlgorithm, Communicator], environment: str, rendezvous: Rendezvous
) -> AllReduceTimings:
    """Return one table for all ranks, from rank 0's cache or timed now; a collective call.

    groups       a communicator for each algorithm, which uses no other for sums
    environment  this rank's GPU and libraries, on which the times depend
    """
    environments = rendezvous.exchange("autotune/environment", environment)
    key = json.dumps([VERSION, COLUMNS, SIZES, environments])
    file = cache_dir() / f"all-reduce-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    cached = rendezvous.exchange("autotune/cached", _load(file, key) if rendezvous.rank == 0 else "")[0]
    if cached:
        return AllReduceTimings(**json.loads(cached), cached=True)
    wait_for_imports()
    started = time.perf_counter()
    times = [json.loads(text) for text in rendezvous.exchange("autotune/times", json.dumps(_measure(groups)))]
    us = {name: [max(column) for column in zip(*(rank[name] for rank in times), strict=True)] for name in groups}
    table = AllReduceTimings(SIZES, us)
    if rendezvous.rank == 0:
        log.info("timed the all-reduce algorithms in %.2f s, cached as %s", time.perf_counter() - started, file)
        _save(file, key, table)
    return table


def _measure(groups: Mapping[AllReduceAlgorithm, Communicator]) -> dict[AllReduceAlgorithm, list[float]]:
    times: dict[AllReduceAlgorithm, list[float]] = {name: [] for name in groups}
    for nbytes in SIZES:
        for name, comm in groups.items():
            if nbytes > LARGEST[name]:
                times[name].append(math.inf)
                continue
            call = _all_reduce_and_norm(comm, nbytes)
            call()  # loads kernels
            times[name].append(graph_us(comm, call, length=GRAPH_LENGTH, times=REPLAYS, rounds=ROUNDS))
    torch.cuda.empty_cache()  # else the memory of the graphs would count as used when the KV cache is sized
    return times


def _all_reduce_and_norm(comm: Communicator, nbytes: int) -> Callable[[], Tensor]:
    """Return an all-reduce + residual + RMSNorm of `nbytes` of zeros, which stay zeros."""
    dtype, device = torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    rows = nbytes // dtype.itemsize // COLUMNS
    x, residual = torch.zeros(2, rows, COLUMNS, dtype=dtype, device=device)
    weight = torch.ones(COLUMNS, dtype=dtype, device=device)

    def call() -> Tensor:
        buffer = comm.buffer(rows, COLUMNS, dtype)
        return comm.all_reduce_add_rms_norm(x if buffer is None else buffer, residual, weight, EPS)

    return call


def _cell(us: float, is_best: bool) -> str:
    return f"{us:.1f}{'*' if is_best else ' '}" if us < math.inf else "- "


def _load(file: Path, key: str) -> str:
    """Return the cached table of this key as JSON; empty if there is none that can be read."""
    if not file.exists():
        return ""
    try:
        entry = json.loads(file.read_text())
        return json.dumps(entry["table"]) if entry["key"] == key else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("cannot read the cached times of the all-reduce algorithms in %s: %r", file, error)
        return ""


def _save(file: Path, key: str, table: AllReduceTimings) -> None:
    """Write the whole file or none; if the folder cannot be written, the next start times again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as scratch:
            json.dump({"key": key, "table": {"sizes": table.sizes, "us": table.us}}, scratch)
        os.replace(scratch.name, file)
    except OSError as error:
        log.warning("cannot cache the times of the all-reduce algorithms: %s", error)
