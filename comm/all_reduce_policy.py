"""The policy of all-reduces between GPUs: which algorithm serves a message of how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .all_reduce_choice import Algorithm
from .autotune import SIZES
from .format_bytes import format_bytes

SUMMED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by the kernels over peer buffers
GATHER_BYTES = 1 << 20  # of each rank, up to which an all-gather goes through peer buffers
SLOT_BYTES = SIZES[-1]  # the largest message in a peer buffer


@dataclass(frozen=True)
class Policy:
    """The algorithm for each message size; the same on all ranks."""

    steps: tuple[tuple[int, Algorithm], ...]  # (largest size in bytes, algorithm), ascending; NCCL beyond the last
    gather_bytes: int = GATHER_BYTES
    slices: bool = False  # larger messages go in slices of rows instead of to NCCL

    @classmethod
    def only(cls, algorithm: Algorithm, largest: int = SLOT_BYTES, *, slices: bool = False) -> Policy:
        """Return the policy that uses one algorithm for every message up to `largest` bytes, or for all."""
        return cls(((largest, algorithm),), min(GATHER_BYTES, largest), slices)

    def algorithm(self, nbytes: int, dtype: torch.dtype) -> Algorithm:
        """Return the algorithm for a sum of `nbytes`."""
        if nbytes == 0 or dtype not in SUMMED_DTYPES:
            return "nccl"
        return next((algorithm for largest, algorithm in self.steps if nbytes <= largest), "nccl")

    def sliced(self, x: Tensor) -> list[Tensor]:
        """Return the rows of x in as many slices as the policy needs; the slices are views."""
        if not self.slices or x.nbytes <= self.steps[-1][0]:
            return [x]
        return list(x.split(self.steps[-1][0] // (x.nbytes // len(x))))

    def __str__(self) -> str:
        steps = [f"{algorithm} up to {format_bytes(largest)}" for largest, algorithm in self.steps]
        if self.slices:
            return f"{steps[-1]}, and in slices beyond"
        return ", ".join(steps) + (" and NCCL beyond" if steps else "NCCL for sums")
