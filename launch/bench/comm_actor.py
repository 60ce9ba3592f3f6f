"""The Ray actor of `lockstep bench comm`: one rank that verifies and times collectives, without a model.

All ranks get the same calls: bind, prepare, then `measure` for each algorithm and mode, then close.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ...comm.all_reduce_names import PEER_ALGORITHMS, PeerAlgorithm
from ...comm.all_reduce_policy import MAX_GEMM_ROWS, SUMMED_DTYPES, AllReducePolicy
from ...comm.base import Communicator
from ...comm.connect import map_peer_buffers
from ...comm.message_text import first_line
from ...comm.nccl import NcclCommunicator
from ...comm.rendezvous import Rendezvous
from ...comm.timing import capture, eager_us, graph_us, synchronize
from ..cluster.worker import Endpoint, RankActor
from .comm_report import ALGORITHMS, GEMM_ALGORITHMS, CommBenchSpec, Mode, RankCapabilities, TableLine, Timing

if TYPE_CHECKING:
    from ...comm.symmetric import SymmetricCommunicator

EPS = 1e-5
VERIFIED_CALLS = 3  # the graph that is verified has this many


@dataclass(frozen=True)
class TimedCall:
    """A collective of one size: `call(None)` queues it on any values, `call(x)` on the values x [count].

    `call` returns the result, or the residual stream and its norm, in any shape. `on_captured` follows each capture
    in a graph.
    """

    call: Callable[[Tensor | None], Sequence[Tensor]]
    on_captured: Callable[[], None] = lambda: None


class AllReduceAlgorithm(ABC):
    """One way to sum over the ranks, on one rank."""

    fused = False  # True for all-reduce + residual + RMSNorm
    capturable = True

    @abstractmethod
    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        """Return the collective of `count` elements, or None if the algorithm does not have it.

        In place: the result overwrites the input. Algorithms over peer buffers never do that: for them, the input is
        in the peer buffer already, where a GEMM writes it. A push has only inputs elsewhere.
        """

    def close(self) -> None:  # noqa: B027 - most have none
        """Free its memory; a collective call."""


class CommunicatorAllReduce(AllReduceAlgorithm):
    """`all_reduce` of a communicator, or `all_reduce_add_rms_norm` of rows of `columns` if they are given.

    has_buffers  time only the communicator's algorithm over peer memory, without sizes that it does not serve
    """

    def __init__(
        self, comm: Communicator, device: torch.device, columns: int | None = None, *, has_buffers: bool = False
    ) -> None:
        self.comm, self.device, self.columns, self.has_buffers = comm, device, columns, has_buffers
        self.fused, self.capturable = columns is not None, comm.capturable

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        comm, fused, in_buffer = self.comm, self.fused, self.has_buffers and in_place
        rows, columns = shape_of(count, self.columns or count)
        nbytes = count * dtype.itemsize
        if self.has_buffers and not cast("SymmetricCommunicator", comm).uses_peer_memory(nbytes, dtype):
            return None
        if in_buffer and comm.buffer(rows, columns, dtype) is None:
            return None
        new_output = not (self.has_buffers or in_place)
        if new_output and (fused or not isinstance(comm, NcclCommunicator)):
            return None
        initial, weight = norm_inputs(count, columns, dtype, self.device)
        residual, ordinary = initial.clone(), torch.zeros_like(initial)

        def call(values: Tensor | None) -> list[Tensor]:
            x = comm.buffer(rows, columns, dtype) if in_buffer else ordinary
            assert x is not None
            if values is not None:
                x.copy_(values.view(rows, columns))
                residual.copy_(initial)
            if fused:
                return [residual, comm.all_reduce_add_rms_norm(x, residual, weight, EPS)]
            if new_output and isinstance(comm, NcclCommunicator):
                return [comm.all_reduce(x, torch.empty_like(x))]
            return [comm.all_reduce(x)]

        return TimedCall(call)


class GemmAllReduce(AllReduceAlgorithm):
    """A GEMM, then the all-reduce + residual + RMSNorm of its result: the rows that GEMMs may push.

    The GEMM has the shape of a rank's output projection. It reads the same weight in each call, from L2.
    pushes  the GEMM sends its result itself; else the kernel of the all-reduce does
    """

    fused = True

    def __init__(self, comm: SymmetricCommunicator, device: torch.device, columns: int, *, pushes: bool) -> None:
        self.comm, self.device, self.columns = comm, device, columns
        self._sums = comm if pushes else comm.with_policy(replace(comm.policy, gemm_bytes=0))

    def prepare(self, count: int, dtype: torch.dtype, *, in_place: bool) -> TimedCall | None:
        rows, columns = shape_of(count, self.columns)
        if in_place or not self.comm.gemms_push(rows, columns, dtype):
            return None
        initial, norm = norm_inputs(count, columns, dtype, self.device)
        residual, share = initial.clone(), max(columns // self.comm.size, MAX_GEMM_ROWS)
        identity = torch.eye(rows, share, dtype=dtype, device=self.device)
        weight = torch.zeros(columns, share, dtype=dtype, device=self.device)  # its first columns are the values

        def call(values: Tensor | None) -> list[Tensor]:
            if values is not None:
                weight[:, :rows] = values.view(rows, columns).t()
                residual.copy_(initial)
            partial = self._sums.linear(identity, weight, None)
            return [residual, self._sums.all_reduce_add_rms_norm(partial, residual, norm, EPS)]

        return TimedCall(call)


def shape_of(count: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) of a stream of `count` elements; fewer than `columns` make one shorter row."""
    return (count // columns, columns) if count >= columns else (1, count)


def norm_inputs(count: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the residual stream before the sum [T, D] and the norm's weight [D]; the same on every rank."""
    generator = torch.Generator(device).manual_seed(count)
    shape = shape_of(count, columns)
    residual = torch.randn(shape, generator=generator, device=device).to(dtype)
    return residual, torch.randn(shape[1], generator=generator, device=device).to(dtype)


class CommBenchActor(RankActor):
    """One rank of the benchmark; a subclass may add algorithms with `make`."""

    def prepare(self, endpoints: list[Endpoint], spec: CommBenchSpec) -> RankCapabilities:
        """Connect to the other ranks and set up every algorithm that all ranks can run."""
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self._comm = self.connect(endpoints)
        self._device = torch.device(self.config.device, 0) if self.config.device == "cuda" else torch.device("cpu")
        self._rendezvous = Rendezvous(self._store, self.rank, self.size, self.config.step_timeout)
        self._symmetric: SymmetricCommunicator | None = None
        made = {name: self._make_on_all_ranks(name) for name in spec.algorithms or self._default_algorithms()}
        self._algorithms = {name: result for name, result in made.items() if not isinstance(result, str)}
        refused = {name: result for name, result in made.items() if isinstance(result, str)}
        cuda = self._device.type == "cuda"
        modes: dict[str, list[Mode]] = {
            name: ["eager", "graph"] if cuda and algorithm.capturable else ["eager"]
            for name, algorithm in self._algorithms.items()
        }
        device = torch.cuda.get_device_name(0) if cuda else "cpu"
        return RankCapabilities(modes, refused, device, self._comm.description)

    def measure(self, name: str, mode: Mode) -> list[TableLine]:
        """Verify and time every size of one algorithm."""
        algorithm, lines = self._algorithms[name], []
        for nbytes in self.spec.sizes:
            count = nbytes // self.dtype.itemsize
            if algorithm.fused:
                count = math.prod(shape_of(count, self.spec.hidden_size))
            timings = (self._timing(algorithm, mode, count, in_place) for in_place in (False, True))
            lines.append(TableLine(count * self.dtype.itemsize, count, *timings))
        return lines

    def close(self) -> None:
        """Free everything, in the reverse order."""
        for algorithm in reversed(self._algorithms.values()):
            algorithm.close()
        (self._symmetric or self._comm).close()  # the first one closes its NCCL communicator, too

    # --- setup

    def make(self, name: str) -> AllReduceAlgorithm:
        """Return one of ALGORITHMS; raises RuntimeError with the reason if this rank cannot run it."""
        if name in GEMM_ALGORITHMS:
            pushing, pushes = self._symmetric_for("push"), name == "push by GEMM"
            return GemmAllReduce(pushing, self._device, self.spec.hidden_size, pushes=pushes)
        first_word, _, fused = name.partition(" ")
        has_buffers, comm = first_word in PEER_ALGORITHMS, self._comm
        if has_buffers:
            comm = self._symmetric_for(cast(PeerAlgorithm, first_word))
        elif first_word == "nccl":
            comm = self._require_nccl()
        elif isinstance(comm, NcclCommunicator):
            raise RuntimeError("the ranks use NCCL")
        columns = self.spec.hidden_size if fused else None
        return CommunicatorAllReduce(comm, self._device, columns, has_buffers=has_buffers)

    def _default_algorithms(self) -> list[str]:
        if self._device.type == "cpu":
            return ["gloo", "gloo + norm"]
        gloo = not isinstance(self._comm, NcclCommunicator)
        return [name for name in ALGORITHMS if gloo or not name.startswith("gloo")]

    def _make_on_all_ranks(self, name: str) -> AllReduceAlgorithm | str:
        """Return the algorithm, or the reasons of the ranks that cannot run it."""
        try:
            result: AllReduceAlgorithm | str = self.make(name)
        except (RuntimeError, ImportError, OSError, ValueError) as error:
            result = first_line(error)
        timeout_s = 2 * self._rendezvous.timeout_s  # a peer may time out in its setup first
        reason = result if isinstance(result, str) else ""
        reasons = dict.fromkeys(r for r in self._rendezvous.exchange(f"bench/{name}", reason, timeout_s) if r)
        return "; ".join(reasons) or result

    def _require_nccl(self) -> NcclCommunicator:
        if self._device.type != "cuda":
            raise RuntimeError("needs GPUs")
        if not isinstance(self._comm, NcclCommunicator):
            raise RuntimeError(f"needs NCCL: {self._comm.description}")
        return self._comm

    def _symmetric_for(self, algorithm: PeerAlgorithm) -> SymmetricCommunicator:
        """Return a communicator with one algorithm; all of them use the same buffers. Raises as `make` does."""
        nccl, largest = self._require_nccl(), max(self.spec.sizes)
        if self.dtype not in SUMMED_DTYPES:
            raise RuntimeError(f"does not add {self.dtype}")
        if self._symmetric is None:
            buffer_bytes, shares_device = -(-largest // 16) * 16, self.config.gpus_per_rank < 1
            self._symmetric = map_peer_buffers(
                nccl, self._rendezvous, device=self._device, buffer_bytes=buffer_bytes, shares_device=shares_device
            )
        return self._symmetric.with_policy(AllReducePolicy.only(algorithm, largest))

    # --- measurement

    def _timing(self, algorithm: AllReduceAlgorithm, mode: Mode, count: int, in_place: bool) -> Timing | None:
        timed = algorithm.prepare(count, self.dtype, in_place=in_place)
        if timed is None:
            return None
        spec, comm, cuda = self.spec, self._comm, self._device.type == "cuda"
        if mode == "eager":
            wrong = self._verify_eager(timed, algorithm, count)
            us = eager_us(comm, lambda: timed.call(None), warmup=spec.warmup, times=spec.times, cuda=cuda)
        else:
            wrong = self._verify_graph(timed, algorithm, count)
            length, times = spec.graph_length, max(1, spec.times // 4)
            us = graph_us(comm, lambda: timed.call(None), length=length, times=times, on_captured=timed.on_captured)
        return Timing.from_time(us, count * self.dtype.itemsize, self.size, wrong)

    def _verify_eager(self, timed: TimedCall, algorithm: AllReduceAlgorithm, count: int) -> int:
        """Return the wrong elements of one call."""
        inputs = self._inputs(count, 0)
        results = [x.clone() for x in timed.call(inputs[self.rank])]
        if self._device.type == "cuda":
            synchronize(self._comm)
        return self._count_wrong(results, algorithm, inputs)

    def _verify_graph(self, timed: TimedCall, algorithm: AllReduceAlgorithm, count: int) -> int:
        """Return the wrong elements of a graph of a few calls that is replayed twice on other values."""
        x = self._inputs(count, 0)[self.rank].clone()
        timed.call(x)
        synchronize(self._comm)
        results: list[list[Tensor]] = []
        graph = capture(lambda: results.extend([y.clone() for y in timed.call(x)] for _ in range(VERIFIED_CALLS)))
        timed.on_captured()
        wrong = 0
        for turn in (1, 2):
            inputs = self._inputs(count, turn)
            x.copy_(inputs[self.rank])
            graph.replay()
            synchronize(self._comm)
            wrong += sum(self._count_wrong(result, algorithm, inputs) for result in results)
        return wrong

    def _inputs(self, count: int, turn: int) -> list[Tensor]:
        """Return the random input of every rank, made on each rank."""
        device = self._device
        seeds = (1000 * turn + rank + 17 * count for rank in range(self.size))
        generators = (torch.Generator(device).manual_seed(seed) for seed in seeds)
        return [torch.randn(count, generator=generator, device=device).to(self.dtype) for generator in generators]

    def _count_wrong(self, results: list[Tensor], algorithm: AllReduceAlgorithm, inputs: list[Tensor]) -> int:
        """Return how many elements are further from the exact sum than one rounding for each addition."""
        exact, bound = _sum(inputs), torch.finfo(self.dtype).eps * self.size * _sum([x.abs() for x in inputs])
        if not algorithm.fused:
            return int(((results[0].view(-1).double() - exact).abs() > bound).sum())
        return _count_wrong_norm(results, exact, bound, self.spec.hidden_size, self.dtype)


def _count_wrong_norm(results: list[Tensor], added: Tensor, bound: Tensor, columns: int, dtype: torch.dtype) -> int:
    """Return the wrong elements of the residual stream and its norm, if `added` is exact within `bound`."""
    initial, weight = norm_inputs(len(added), columns, dtype, added.device)
    eps, shape = torch.finfo(dtype).eps, initial.shape
    total = initial.double() + added.view(shape)
    bound = bound.view(shape) + eps * total.abs()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    norm = total * scale * weight
    norm_bound = bound * scale * weight.abs() + 4 * eps * norm.abs() + eps
    comparisons = ((results[0], total, bound), (results[1], norm, norm_bound))
    return sum(int(((x.view(shape).double() - y).abs() > b).sum()) for x, y, b in comparisons)


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.double() for x in tensors]).sum(0)
