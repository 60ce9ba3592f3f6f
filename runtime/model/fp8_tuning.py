"""The choice between the two GEMMs with FP8 activations, by timing both on each shape of weight at start.

fp8_gemm, or stream_fp8 in its place, is faster for few rows, the library's GEMM, with kernels around it, for many.
Where they meet depends on shape and GPU. The weights of several layers are multiplied in turn, so that they come from
memory as in a step. The slowest rank's times count, and all ranks choose alike.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...comm.timing import graph_us, wait_for_imports
from ...kernels import ops
from ...kernels.arguments import FP8Weight

log = logging.getLogger(__name__)
ROWS = 16, 32, 64, 128, 256  # of x
TIMED_BYTES = 200 << 20  # of weights: more than the L2 cache
REPLAYS = 3
ADVANTAGE = 1.05  # the library must be this much faster, so that starts with nearly equal times choose alike


@torch.inference_mode()
def tune_fp8_gemms(weights: Sequence[FP8Weight], comm: Communicator, dtype: torch.dtype) -> None:
    """Time and set the choice for every shape of FP8 weights on this rank's GPU; a collective call."""
    groups = _with_two_gemms(weights, comm, dtype)
    if groups:
        _compile([same[0] for same in groups], comm, dtype)
        wait_for_imports()
    for same in groups:
        choice, x = same[0].choice, _input(same[0], dtype)
        some = same[: -(-TIMED_BYTES // same[0].data.nbytes)]
        times = [
            [_us(comm, x[:rows], some, tiled_rows=rows if tiled else 0) for rows in ROWS] for tiled in (True, False)
        ]
        tiled, library = comm.all_gather(torch.tensor(times, device=x.device)).amax(0).tolist()
        choice.tiled_rows = most = tiled_rows(tiled, library)
        if comm.rank == 0:
            log.info("FP8 GEMM %s: %s", list(same[0].shape), _described(most, tiled, library))


def _with_two_gemms(weights: Sequence[FP8Weight], comm: Communicator, dtype: torch.dtype) -> list[list[FP8Weight]]:
    """Return the weights of each choice that there is; none if ranks with unequal shares have other choices."""
    by_choice: dict[int, list[FP8Weight]] = {}
    for weight in weights:
        by_choice.setdefault(id(weight.choice), []).append(weight)
    groups = [same for same in by_choice.values() if ops.has_two_fp8_gemms(_input(same[0], dtype), same[0])]
    ends = repr([same[0].choice.gated for same in groups])
    digests = comm.all_gather(torch.tensor([zlib.crc32(ends.encode())], device=weights[0].data.device))
    if len(digests.unique()) == 1:
        return groups
    if comm.rank == 0:
        log.info("FP8 GEMMs are not timed: ranks have unequal shares of the weights")
    return []


def _input(weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    return torch.zeros(max(ROWS), weight.shape[1], dtype=dtype, device=weight.data.device)


def _compile(weights: Sequence[FP8Weight], comm: Communicator, dtype: torch.dtype) -> None:
    """Compile the kernels that are timed, and those of gated layers, in threads: one after the other takes seconds."""
    from ...kernels.cuda.kernel_launch import compile_kernels, requested_kernels  # imports CuPy

    with requested_kernels() as instances:
        for weight, rows in itertools.product(weights, ROWS):
            x = _input(weight, dtype)[:rows]
            for most in (rows, 0):
                _multiply(x, weight, tiled_rows=most)
                for feeds in weights if weight.choice.gated else ():
                    if 2 * feeds.shape[1] == weight.shape[0]:
                        ops.gated_linear(x, weight, feeds)
    compile_kernels(instances, weights[0].data.device, comm.rank, comm.size)


def tiled_rows(tiled: Sequence[float], library: Sequence[float]) -> int:
    """Return the most rows for which fp8_gemm is faster, and is so for all fewer; both have a time for each of ROWS."""
    faster = itertools.takewhile(lambda times: times[1] <= times[2] * ADVANTAGE, zip(ROWS, tiled, library, strict=True))
    return max((rows for rows, *_ in faster), default=0)


def _us(comm: Communicator, x: Tensor, weights: Sequence[FP8Weight], *, tiled_rows: int) -> float:
    """Return the time of one linear layer of x with fp8_gemm up to this many rows."""
    turns = itertools.cycle(weights)

    def multiply() -> Tensor:
        return _multiply(x, next(turns), tiled_rows=tiled_rows)

    multiply()  # loads the kernels
    return graph_us(comm, multiply, length=len(weights), times=REPLAYS)


def _multiply(x: Tensor, weight: FP8Weight, *, tiled_rows: int) -> Tensor:
    weight.choice.tiled_rows = tiled_rows
    return ops.linear(x, weight, gated=weight.choice.gated)


def _described(most: int, tiled: Sequence[float], library: Sequence[float]) -> str:
    choice = f"fp8_gemm up to {most} rows, cuBLAS beyond" if most else "cuBLAS"
    times = ", ".join(f"{rows}: {a:.1f} / {b:.1f}" for rows, a, b in zip(ROWS, tiled, library, strict=True))
    return f"{choice} (us by rows, fp8_gemm / cuBLAS: {times})"
