"""The choice between the two GEMMs with FP8 activations, by timing both on each shape of weight at start.

fp8_gemm is faster for few rows, the library's GEMM, with kernels around it, for many. Where they meet depends on shape
and GPU. The weights of several layers are multiplied in turn, so that they come from memory as in a step. The slowest
rank's times count, and all ranks choose alike.
"""

from __future__ import annotations

import itertools
import logging
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
    for group in {id(weight.choice): weight for weight in weights}.values():
        same = [weight for weight in weights if weight.choice is group.choice]
        x = torch.zeros(max(ROWS), group.shape[1], dtype=dtype, device=group.data.device)
        if not ops.has_two_fp8_gemms(x, group):
            continue
        wait_for_imports()
        some = same[: -(-TIMED_BYTES // group.data.nbytes)]
        times = [
            [_us(comm, x[:rows], some, tiled_rows=rows if tiled else 0) for rows in ROWS] for tiled in (True, False)
        ]
        tiled, library = comm.all_gather(torch.tensor(times, device=x.device)).amax(0).tolist()
        group.choice.tiled_rows = most = tiled_rows(tiled, library)
        if comm.rank == 0:
            log.info("FP8 GEMM %s: %s", list(group.shape), _described(most, tiled, library))


def tiled_rows(tiled: Sequence[float], library: Sequence[float]) -> int:
    """Return the most rows for which fp8_gemm is faster, and is so for all fewer; both have a time for each of ROWS."""
    faster = itertools.takewhile(lambda times: times[1] <= times[2] * ADVANTAGE, zip(ROWS, tiled, library, strict=True))
    return max((rows for rows, *_ in faster), default=0)


def _us(comm: Communicator, x: Tensor, weights: Sequence[FP8Weight], *, tiled_rows: int) -> float:
    """Return the time of one linear layer of x with fp8_gemm up to this many rows."""
    choice, turns = weights[0].choice, itertools.cycle(weights)
    choice.tiled_rows = tiled_rows
    ops.linear(x, next(turns), gated=choice.gated)  # compiles
    return graph_us(comm, lambda: ops.linear(x, next(turns), gated=choice.gated), length=len(weights), times=REPLAYS)


def _described(most: int, tiled: Sequence[float], library: Sequence[float]) -> str:
    choice = f"fp8_gemm up to {most} rows, cuBLAS beyond" if most else "cuBLAS"
    times = ", ".join(f"{rows}: {a:.1f} / {b:.1f}" for rows, a, b in zip(ROWS, tiled, library, strict=True))
    return f"{choice} (us by rows, fp8_gemm / cuBLAS: {times})"
