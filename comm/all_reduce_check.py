"""Check at start-up that the all-reduce kernels over peer memory compute what NCCL computes.

The ranks compare each size with the algorithm that the policy chooses for it, in the model's columns and dtype, and
sums that GEMMs push. The inputs are small integers: their sums have no rounding, so the bits of all algorithms must be
equal. RMSNorm is compared within the rounding of its result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import ops
from .all_reduce_names import AllReduceAlgorithm
from .all_reduce_policy import EPS, MAX_GEMM_ROWS, SIZES, AllReducePolicy
from .base import CommError, Communicator
from .message_text import format_bytes
from .rendezvous import Rendezvous
from .timing import capture, synchronize

TURNS = 2  # inputs of each size, all different: a result of the previous collective is noticed
GRAPH_BYTES = 4 << 20  # larger sums belong to steps without a graph
LARGEST_INTEGER = 8  # bfloat16 holds integers up to 256 exactly: the sums of 8 ranks with a residual


@dataclass(frozen=True)
class RowShape:
    """The columns, dtype and device of the rows that a model sums."""

    columns: int
    dtype: torch.dtype
    device: torch.device

    def num_rows(self, nbytes: int) -> int:
        """Return the rows of a message of at most `nbytes`; at least one."""
        return max(1, nbytes // (self.columns * self.dtype.itemsize))

    def nbytes(self, rows: int) -> int:
        return rows * self.columns * self.dtype.itemsize

    def integers(self, rows: int, seed: int) -> Tensor:
        """Return random integers [rows, columns], equal on all ranks for the same seed."""
        limits, size = (-LARGEST_INTEGER, LARGEST_INTEGER + 1), (rows, self.columns)
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randint(*limits, size, generator=generator, device=self.device, dtype=torch.int8)
        return drawn.to(self.dtype)


@dataclass(frozen=True)
class CheckedSize:
    """Rows whose sums are checked, and the algorithm that serves them."""

    rows: int
    algorithm: AllReduceAlgorithm
    of_gemms: bool = False  # the sums of Communicator.linear, which GEMMs may push

    def describe(self, shape: RowShape) -> str:
        return f"{format_bytes(shape.nbytes(self.rows))}{' of GEMMs' if self.of_gemms else ''}"


@dataclass(frozen=True)
class Trial:
    """One input of this rank, and NCCL's results for the inputs of all ranks."""

    x: Tensor  # [T, D]
    residual: Tensor  # [T, D]
    weight: Tensor  # [D]
    total: Tensor  # the sum over the ranks
    total_with_residual: Tensor
    norm: Tensor

    @classmethod
    def draw(cls, nccl: Communicator, shape: RowShape, rows: int, turn: int) -> Trial:
        first_seed = turn * (nccl.size + 2)
        x = shape.integers(rows, first_seed + 2 + nccl.rank)
        residual, weight = shape.integers(rows, first_seed), shape.integers(1, first_seed + 1)[0]
        total, total_with_residual = nccl.all_reduce(x.clone()), residual.clone()
        norm = ops.add_rms_norm(total.clone(), total_with_residual, weight, EPS)
        return cls(x, residual, weight, total, total_with_residual, norm)

    def count_wrong(self, comm: Communicator, *, of_gemms: bool) -> Tensor:
        """Return how many elements of sums over `comm` differ, with the norm and without; int64 on the device.

        of_gemms  there is a sum with the norm only, of products that are equal to x
        """
        if of_gemms:
            return self._count_wrong_norms(comm, self._multiply(comm))
        total = comm.all_reduce(self._place_input(comm))
        return (total != self.total).sum() + self._count_wrong_norms(comm, self._place_input(comm))

    def _count_wrong_norms(self, comm: Communicator, x: Tensor) -> Tensor:
        residual = self.residual.clone()
        norm = comm.all_reduce_add_rms_norm(x, residual, self.weight, EPS)
        tolerance = 4 * torch.finfo(norm.dtype).eps
        norm_is_wrong = ~torch.isclose(norm, self.norm, rtol=tolerance, atol=tolerance)
        return (residual != self.total_with_residual).sum() + norm_is_wrong.sum()

    def _multiply(self, comm: Communicator) -> Tensor:
        """Return x as the product of rows of the identity and a weight that has the rows of x as its columns."""
        weight = F.pad(self.x.t(), (0, MAX_GEMM_ROWS - len(self.x))).contiguous()
        identity = torch.eye(len(self.x), MAX_GEMM_ROWS, dtype=weight.dtype, device=weight.device)
        return comm.linear(identity, weight, None)

    def _place_input(self, comm: Communicator) -> Tensor:
        rows, columns = self.x.shape
        buffer = comm.buffer(rows, columns, self.x.dtype)
        return self.x.clone() if buffer is None else buffer.copy_(self.x)


def wrong_algorithms(
    comm: Communicator,
    nccl: Communicator,
    policy: AllReducePolicy,
    rendezvous: Rendezvous,
    shape: RowShape,
    attempt: int = 0,
) -> dict[AllReduceAlgorithm, str]:
    """Return the algorithms of `policy` that compute wrong sums, with the smallest such size; equal on all ranks.

    comm     uses `policy`
    attempt  a number that no earlier call in this group had
    Raises CommError, with the algorithm, if one waits for a peer in vain.
    """
    sizes = _checked_sizes(comm, policy, shape)
    faults: dict[AllReduceAlgorithm, str] = {}
    for size, count in zip(sizes, _counts(comm, nccl, sizes, shape), strict=True):
        if count:
            faults.setdefault(size.algorithm, f"{count} wrong elements at {size.describe(shape)}")
    if shape.device.type == "cuda":
        torch.cuda.empty_cache()  # else the memory of the graph would count as used when the KV cache is sized
    agreed: dict[AllReduceAlgorithm, str] = {}
    for rank, text in enumerate(rendezvous.exchange(f"all-reduce check {attempt}", json.dumps(faults))):
        for name, fault in json.loads(text).items():
            agreed.setdefault(name, f"rank {rank}: {fault}")
    return agreed


def _checked_sizes(comm: Communicator, policy: AllReducePolicy, shape: RowShape) -> list[CheckedSize]:
    chosen = {n: policy.algorithm(shape.nbytes(n), shape.dtype) for n in map(shape.num_rows, SIZES)}
    sizes = [CheckedSize(n, algorithm) for n, algorithm in chosen.items() if algorithm != "nccl"]
    gemms = [n for n in range(1, MAX_GEMM_ROWS + 1) if comm.gemms_push(n, shape.columns, shape.dtype)]
    return sizes + [CheckedSize(n, "push", of_gemms=True) for n in dict.fromkeys(gemms[:1] + gemms[-1:])]


def _counts(comm: Communicator, nccl: Communicator, sizes: list[CheckedSize], shape: RowShape) -> list[int]:
    """Return the number of wrong elements for each size: in calls, and in a graph of calls."""
    counts = torch.zeros(len(sizes), dtype=torch.int64, device=shape.device)
    captured: list[tuple[int, Trial]] = []
    for place, size in enumerate(sizes):
        trials = [Trial.draw(nccl, shape, size.rows, turn) for turn in range(TURNS)]
        with _named_failure(size.algorithm, size.describe(shape)):
            for trial in trials:
                counts[place] += trial.count_wrong(comm, of_gemms=size.of_gemms)
            _finish(comm, shape)
        if shape.nbytes(size.rows) <= GRAPH_BYTES:
            captured += [(place, trial) for trial in trials]

    def launch() -> None:
        for place, trial in captured:
            counts[place] += trial.count_wrong(comm, of_gemms=sizes[place].of_gemms)

    if captured and shape.device.type == "cuda":
        with _named_failure(", ".join(sorted({size.algorithm for size in sizes})), "a CUDA graph"):
            graph = capture(launch)
            for _ in range(2):
                graph.replay()
            _finish(comm, shape)
    numbers: list[int] = counts.tolist()
    return numbers


def _finish(comm: Communicator, shape: RowShape) -> None:
    if shape.device.type == "cuda":
        synchronize(comm)


@contextmanager
def _named_failure(algorithm: str, size: str) -> Iterator[None]:
    try:
        yield
    except CommError as error:
        way_out = "--all-reduce nccl shares no memory"
        raise CommError(f"checking all-reduce {algorithm} with {size}: {error}; {way_out}") from error
