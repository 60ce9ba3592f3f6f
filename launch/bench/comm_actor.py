"""The Ray actor of `lockstep bench comm`: one rank that verifies and times collectives, without a model.

All ranks get the same calls: bind, prepare, then `measure` for each algorithm and mode, then close.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...comm.all_reduce_policy import SUMMED_DTYPES, Policy
from ...comm.base import Communicator, NotShared
from ...comm.error_text import first_line
from ...comm.nccl import NcclCommunicator
from ...comm.rendezvous import Rendezvous
from ...comm.shared_memory import share_buffers
from ...comm.timing import capture, eager_us, graph_us, synchronize
from ..cluster.rank_actor import Endpoint, RankActor
from .comm_algorithms import (
    EPS,
    AllReduceAlgorithm,
    AllReduceAndNorm,
    CommunicatorAllReduce,
    NcclWindowAllReduce,
    TimedCall,
    Unavailable,
    norm_inputs,
    shape_of,
)
from .comm_baselines import TorchDistributedAllReduce, TorchSymmetricAllReduce

if TYPE_CHECKING:
    from ...comm.symmetric import SymmetricCommunicator

Mode = Literal["eager", "graph"]
NAMES = (
    "one-shot", "two-shot", "one-shot fused", "two-shot fused", "nccl", "nccl + norm", "nccl window",
    "gloo", "gloo + norm", "torch.distributed", "torch symmetric one-shot", "torch symmetric two-shot", "flashinfer",
)  # fmt: skip
VERIFIED_CALLS = 3  # in the graph whose results are verified


@dataclass(frozen=True, kw_only=True)
class CommBenchSpec:
    """The collectives to measure."""

    sizes: list[int]  # bytes
    dtype: str
    hidden_size: int  # columns of the residual stream
    algorithms: list[str]  # if empty, all that fit the ranks' communicator
    warmup: int
    times: int
    graph_length: int


@dataclass(frozen=True)
class RankCapabilities:
    """The algorithms that a rank can run, with their modes, the reasons against the others, and its devices."""

    modes: dict[str, list[Mode]]
    refused: dict[str, str]
    device: str
    communication: str


@dataclass(frozen=True)
class CommTiming:
    """One size of one algorithm on one rank."""

    us: float
    wrong: int  # elements of the result


@dataclass(frozen=True)
class SizeTimings:
    """The timings of one size; None if the algorithm has no such collective."""

    nbytes: int
    count: int
    out_of_place: CommTiming | None
    in_place: CommTiming | None


class CommBenchActor(RankActor):
    """One rank of the benchmark."""

    def prepare(self, endpoints: list[Endpoint], spec: CommBenchSpec) -> RankCapabilities:
        """Connect to the other ranks and set up every algorithm that all ranks can run."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self._comm = self.connect(endpoints[0])
        self._device = torch.device(self.config.device, 0) if self.config.device == "cuda" else torch.device("cpu")
        assert self._store is not None
        self._rendezvous = Rendezvous(self._store, self.rank, self.size, self.config.step_timeout)
        self._algorithms: dict[str, AllReduceAlgorithm] = {}
        self._symmetric: SymmetricCommunicator | None = None
        refused = {}
        for name in spec.algorithms or self._default_algorithms():
            try:
                self._algorithms[name] = self._make_on_all_ranks(name)
            except Unavailable as reason:
                refused[name] = str(reason)
        modes = {name: _modes(algorithm, self._device) for name, algorithm in self._algorithms.items()}
        device = torch.cuda.get_device_name(0) if self._device.type == "cuda" else "cpu"
        return RankCapabilities(modes, refused, device, self._comm.description)

    def measure(self, name: str, mode: Mode) -> list[SizeTimings]:
        """Verify and time every size of one algorithm."""
        algorithm, results = self._algorithms[name], []
        for nbytes in self.spec.sizes:
            count = nbytes // self.dtype.itemsize
            if algorithm.fused:
                count = math.prod(shape_of(count, self.spec.hidden_size))
            timings = (self._timing(algorithm, mode, count, in_place) for in_place in (False, True))
            results.append(SizeTimings(count * self.dtype.itemsize, count, *timings))
        return results

    def close(self) -> None:
        """Free everything, in the reverse order."""
        for algorithm in reversed(self._algorithms.values()):
            algorithm.close()
        if self._symmetric is not None:
            self._symmetric.close()  # and its NCCL communicator
        else:
            self._comm.close()

    # --- setup

    def _default_algorithms(self) -> list[str]:
        if self._device.type == "cpu":
            return ["gloo", "gloo + norm", "torch.distributed"]
        gloo = not isinstance(self._comm, NcclCommunicator)
        return [name for name in NAMES if gloo or not name.startswith("gloo")]

    def _make_on_all_ranks(self, name: str) -> AllReduceAlgorithm:
        """Return the algorithm; raises Unavailable with the reason of each rank that cannot run it."""
        algorithm, reason = _attempt(partial(self._make, name))
        timeout_s = 2 * self._rendezvous.timeout_s  # a peer may time out in its setup first
        reasons = self._rendezvous.exchange(f"bench/{name}", reason, timeout_s)
        refusals = dict.fromkeys(r for r in reasons if r)
        if refusals:
            raise Unavailable("; ".join(refusals))
        assert algorithm is not None
        return algorithm

    def _make(self, name: str) -> AllReduceAlgorithm:
        comm, device, columns, largest = self._comm, self._device, self.spec.hidden_size, max(self.spec.sizes)
        nccl = comm if isinstance(comm, NcclCommunicator) else None
        if name in ("gloo", "gloo + norm") and nccl is not None:
            raise Unavailable("the ranks use NCCL")
        if name in ("gloo", "nccl"):
            return CommunicatorAllReduce(name, self._required(name), device)
        if name in ("gloo + norm", "nccl + norm"):
            return AllReduceAndNorm(name, self._required(name.split()[0]), device, columns)
        if name == "torch.distributed":
            return TorchDistributedAllReduce(self._rendezvous, device, self._ip)
        if device.type != "cuda":
            raise Unavailable("needs GPUs")
        if name.startswith("torch symmetric"):
            return TorchSymmetricAllReduce(name.split()[-1], self._rendezvous, device, self.dtype, largest)
        if name == "flashinfer":
            from .flashinfer_all_reduce import FlashInferAllReduce  # imports CuPy

            return FlashInferAllReduce(self._rendezvous, device, largest)
        if nccl is None:
            raise Unavailable(f"needs NCCL: {comm.description}")
        if name == "nccl window":
            return NcclWindowAllReduce(nccl, largest, device)
        shots, _, fused = name.partition(" ")
        symmetric = self._symmetric_for(shots, nccl)
        if fused:
            return AllReduceAndNorm(name, symmetric, device, columns, has_buffers=True)
        return CommunicatorAllReduce(name, symmetric, device, has_buffers=True)

    def _required(self, name: str) -> Communicator:
        if (name == "nccl") != isinstance(self._comm, NcclCommunicator):
            raise Unavailable("needs GPUs" if self._device.type == "cpu" else self._comm.description)
        return self._comm

    def _symmetric_for(self, shots: str, nccl: NcclCommunicator) -> SymmetricCommunicator:
        """Return a communicator with one algorithm; all of them use the same buffers."""
        if self.dtype not in SUMMED_DTYPES:
            raise Unavailable(f"does not add {self.dtype}")
        largest = max(self.spec.sizes)
        if self._symmetric is None:
            try:
                slot_bytes, shares_device = -(-largest // 16) * 16, self.config.gpus_per_rank < 1
                self._symmetric = share_buffers(
                    nccl, self._rendezvous, device=self._device, slot_bytes=slot_bytes, shares_device=shares_device
                )
            except NotShared as reason:
                raise Unavailable(str(reason)) from reason
        return self._symmetric.with_policy(Policy.only("one-shot" if shots == "one-shot" else "two-shot", largest))

    # --- measurement

    def _timing(self, algorithm: AllReduceAlgorithm, mode: Mode, count: int, in_place: bool) -> CommTiming | None:
        timed = algorithm.prepare(count, self.dtype, in_place=in_place)
        if timed is None:
            return None
        spec, comm, cuda = self.spec, self._comm, self._device.type == "cuda"
        verify = self._verify_eager if mode == "eager" else self._verify_graph
        wrong = verify(timed, algorithm, count)
        if mode == "eager":
            us = eager_us(comm, lambda: timed.call(None), warmup=spec.warmup, times=spec.times, cuda=cuda)
        else:
            length, times = spec.graph_length, max(1, spec.times // 4)
            us = graph_us(comm, lambda: timed.call(None), length=length, times=times, on_captured=timed.on_captured)
        return CommTiming(us, wrong)

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
            return int(((results[0].double() - exact).abs() > bound).sum())
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


def _modes(algorithm: AllReduceAlgorithm, device: torch.device) -> list[Mode]:
    return ["eager", "graph"] if device.type == "cuda" and algorithm.capturable else ["eager"]


def _attempt(make: Callable[[], AllReduceAlgorithm]) -> tuple[AllReduceAlgorithm | None, str]:
    """Return the algorithm, or None and the reason."""
    try:
        return make(), ""
    except (RuntimeError, ImportError, OSError, ValueError) as error:
        return None, first_line(error)
