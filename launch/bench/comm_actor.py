"""The Ray actor of `lockstep bench comm`: one rank that checks and times collectives, without a model.

The calls come on all ranks at once: bind, prepare, then `measure` for each block, then close.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...comm.base import Communicator
from ...comm.nccl import NcclCommunicator
from ...comm.peer_buffers import NotShared, join
from ...comm.rendezvous import exchange
from ...comm.symmetric import SUMMED, Policy, SymmetricCommunicator
from ...comm.timing import capture, eager_us, graph_us, settle
from ..cluster.rank_actor import Endpoint, RankActor
from .comm_algorithms import (
    EPS,
    Algorithm,
    Case,
    Completion,
    NcclWindow,
    Ours,
    Plain,
    Unavailable,
    completion_inputs,
    shape_of,
)
from .comm_baselines import BaselineContext, FlashInfer, TorchDistributed, TorchSymmetric

Mode = Literal["eager", "graph"]
NAMES = (
    "one-shot", "two-shot", "one-shot fused", "two-shot fused", "nccl", "nccl + norm", "nccl window",
    "gloo", "gloo + norm", "torch.distributed", "torch symmetric one-shot", "torch symmetric two-shot", "flashinfer",
)  # fmt: skip
CHECKED = 3  # collectives of the graph that is checked


@dataclass(frozen=True, kw_only=True)
class CommBenchSpec:
    """What to measure."""

    sizes: list[int]  # bytes
    dtype: str
    hidden_size: int  # columns of the residual stream
    algorithms: list[str]  # all that the ranks' communicator is meant for, if empty
    warmup: int
    times: int
    graph_length: int


@dataclass(frozen=True)
class RankCapabilities:
    """What a rank has: the algorithms with their modes, why others are not, and on what it runs."""

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
class Row:
    """Both ways of one size; None: there is no such collective."""

    nbytes: int
    count: int
    out_of_place: CommTiming | None
    in_place: CommTiming | None


class CommBenchActor(RankActor):
    """One rank of the benchmark."""

    def prepare(self, endpoints: list[Endpoint], spec: CommBenchSpec) -> RankCapabilities:
        """Meet the others, and set up every algorithm that all ranks can run."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        self._comm = self.connect(endpoints[0])
        self._device = torch.device(self.config.device, 0) if self.config.device == "cuda" else torch.device("cpu")
        assert self._store is not None
        self._place = BaselineContext(self.rank, self.size, self._store, self._device, self.config.step_timeout)
        self._algorithms: dict[str, Algorithm] = {}
        self._ours: SymmetricCommunicator | None = None
        refused = {}
        for name in spec.algorithms or self._usual():
            try:
                self._algorithms[name] = self._agreed(name)
            except Unavailable as reason:
                refused[name] = str(reason)
        modes = {name: _modes(a, self._device) for name, a in self._algorithms.items()}
        device = torch.cuda.get_device_name(0) if self._device.type == "cuda" else "cpu"
        return RankCapabilities(modes, refused, device, self._comm.description)

    def measure(self, name: str, mode: Mode) -> list[Row]:
        """A block: every size of one algorithm."""
        rows = []
        for nbytes in self.spec.sizes:
            count = nbytes // self.dtype.itemsize
            if self._algorithms[name].fused:
                count = math.prod(shape_of(count, self.spec.hidden_size))
            cells = (self._cell(self._algorithms[name], mode, count, in_place) for in_place in (False, True))
            rows.append(Row(count * self.dtype.itemsize, count, *cells))
        return rows

    def close(self) -> None:
        """Free everything, in the reverse order."""
        for algorithm in reversed(self._algorithms.values()):
            algorithm.close()
        if self._ours is not None:
            self._ours.close()  # with its NCCL
        else:
            self._comm.close()

    # --- setting up

    def _usual(self) -> list[str]:
        """What is worth trying here."""
        if self._device.type == "cpu":
            return ["gloo", "gloo + norm", "torch.distributed"]
        gloo = not isinstance(self._comm, NcclCommunicator)
        return [name for name in NAMES if gloo or not name.startswith("gloo")]

    def _agreed(self, name: str) -> Algorithm:
        """The algorithm, or Unavailable with the reason of whichever rank cannot run it."""
        algorithm, reason = _try(partial(self._make, name))
        patience_s = 2 * self._place.timeout_s  # for who waits for this rank while it is set up
        reasons = exchange(self._place.store, f"bench/{name}", reason, self.rank, self.size, patience_s)
        refusals = dict.fromkeys(r for r in reasons if r)
        if refusals:
            raise Unavailable("; ".join(refusals))
        assert algorithm is not None
        return algorithm

    def _make(self, name: str) -> Algorithm:
        comm, device, columns, largest = self._comm, self._device, self.spec.hidden_size, max(self.spec.sizes)
        nccl = comm if isinstance(comm, NcclCommunicator) else None
        if name in ("gloo", "gloo + norm") and nccl is not None:
            raise Unavailable("the ranks use NCCL")
        if name in ("gloo", "nccl"):
            return Plain(name, self._required(name), device)
        if name in ("gloo + norm", "nccl + norm"):
            return Completion(name, self._required(name.split()[0]), device, columns)
        if name == "torch.distributed":
            return TorchDistributed(self._place, self._ip)
        if device.type != "cuda":
            raise Unavailable("needs GPUs")
        if name.startswith("torch symmetric"):
            return TorchSymmetric(name.split()[-1], self._place, self.dtype, largest)
        if name == "flashinfer":
            return FlashInfer(self._place, largest)
        if nccl is None:
            raise Unavailable(f"needs NCCL: {comm.description}")
        if name == "nccl window":
            return NcclWindow(nccl, largest, device)
        shots, _, fused = name.partition(" ")
        ours = self._shared(shots, nccl)
        return Completion(name, ours, device, columns) if fused else Ours(name, ours, device)

    def _required(self, name: str) -> Communicator:
        if (name == "nccl") != isinstance(self._comm, NcclCommunicator):
            raise Unavailable("needs GPUs" if self._device.type == "cpu" else self._comm.description)
        return self._comm

    def _shared(self, shots: str, nccl: NcclCommunicator) -> SymmetricCommunicator:
        """A communicator that adds up by this algorithm only; all of them use one arena."""
        if self.dtype not in SUMMED:
            raise Unavailable(f"does not add {self.dtype}")
        largest = max(self.spec.sizes)
        if self._ours is None:
            shares = self.config.gpus_per_rank < 1
            slot_bytes = -(-largest // 16) * 16
            options = {"device": self._device, "slot_bytes": slot_bytes, "shares_device": shares}
            try:
                arena = join(
                    self._place.store,
                    self.rank,
                    self.size,
                    timeout_s=self._place.timeout_s,
                    **options,  # type: ignore[arg-type]
                )
            except NotShared as reason:
                raise Unavailable(str(reason)) from reason
            self._ours = SymmetricCommunicator(nccl, arena, Policy(()), self._device)
        policy = Policy.only("one-shot" if shots == "one-shot" else "two-shot", largest)
        return SymmetricCommunicator(nccl, self._ours._arena, policy, self._device)

    # --- measuring

    def _cell(self, algorithm: Algorithm, mode: Mode, count: int, in_place: bool) -> CommTiming | None:
        case = algorithm.case(count, self.dtype, in_place=in_place)
        if case is None:
            return None
        spec, comm, cuda = self.spec, self._comm, self._device.type == "cuda"
        check = self._check_eager if mode == "eager" else self._check_graph
        wrong = check(case, algorithm, count)
        if mode == "eager":
            us = eager_us(comm, lambda: case.call(None), warmup=spec.warmup, times=spec.times, cuda=cuda)
        else:
            length, times = spec.graph_length, max(1, spec.times // 4)
            us = graph_us(comm, lambda: case.call(None), length=length, times=times, captured=case.captured)
        return CommTiming(us, wrong)

    def _check_eager(self, case: Case, algorithm: Algorithm, count: int) -> int:
        parts = self._parts(count, 0)
        found = [x.clone() for x in case.call(parts[self.rank])]
        if self._device.type == "cuda":
            settle(self._comm)
        return self._wrong(found, algorithm, parts)

    def _check_graph(self, case: Case, algorithm: Algorithm, count: int) -> int:
        """A graph of a few collectives, replayed twice on other values."""
        x = self._parts(count, 0)[self.rank].clone()
        case.call(x)
        settle(self._comm)
        results: list[list[Tensor]] = []
        graph = capture(lambda: results.extend([y.clone() for y in case.call(x)] for _ in range(CHECKED)))
        case.captured()
        wrong = 0
        for turn in (1, 2):
            parts = self._parts(count, turn)
            x.copy_(parts[self.rank])
            graph.replay()
            settle(self._comm)
            wrong += sum(self._wrong(found, algorithm, parts) for found in results)
        return wrong

    def _parts(self, count: int, turn: int) -> list[Tensor]:
        """What each rank brings: random numbers, made on every rank."""
        device = self._device
        seeds = (1000 * turn + rank + 17 * count for rank in range(self.size))
        randoms = (torch.Generator(device).manual_seed(seed) for seed in seeds)
        return [torch.randn(count, generator=random, device=device).to(self.dtype) for random in randoms]

    def _wrong(self, found: list[Tensor], algorithm: Algorithm, parts: list[Tensor]) -> int:
        """Elements further from the exact result than one rounding for each addition can take them."""
        exact, bound = _sum(parts), torch.finfo(self.dtype).eps * self.size * _sum([x.abs() for x in parts])
        if not algorithm.fused:
            return int(((found[0].double() - exact).abs() > bound).sum())
        return _wrong_completion(found, exact, bound, self.spec.hidden_size, self.dtype)


def _wrong_completion(found: list[Tensor], added: Tensor, bound: Tensor, columns: int, dtype: torch.dtype) -> int:
    """Of the residual stream and its norm, when `added` is exact within `bound`."""
    start, weight = completion_inputs(len(added), columns, dtype, added.device)
    eps, shape = torch.finfo(dtype).eps, start.shape
    total = start.double() + added.view(shape)
    bound = bound.view(shape) + eps * total.abs()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    norm = total * scale * weight
    norm_bound = bound * scale * weight.abs() + 4 * eps * norm.abs() + eps
    pairs = ((found[0], total, bound), (found[1], norm, norm_bound))
    return sum(int(((x.view(shape).double() - y).abs() > b).sum()) for x, y, b in pairs)


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.double() for x in tensors]).sum(0)


def _modes(algorithm: Algorithm, device: torch.device) -> list[Mode]:
    return ["eager", "graph"] if device.type == "cuda" and algorithm.capturable else ["eager"]


def _try(make: Callable[[], Algorithm]) -> tuple[Algorithm | None, str]:
    """The algorithm, or why there is none."""
    try:
        return make(), ""
    except (RuntimeError, ImportError, OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, lines[0] if lines else type(error).__name__
