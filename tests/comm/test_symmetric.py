"""Peer memory between ranks: buffers, agreement, errors and the end; on a GPU, with the kernels.

Without a GPU the ranks are threads and the memory is the host's. The GPU tests share device 0 as those of test_nccl.py.
"""

from __future__ import annotations

import importlib
import itertools
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore

from lockstep.comm import connect as connecting
from lockstep.comm.all_reduce_check import RowShape, wrong_algorithms
from lockstep.comm.all_reduce_names import ALL_REDUCE_ALGORITHMS, AllReduceChoice
from lockstep.comm.all_reduce_policy import (
    BUFFER_BYTES,
    PUSH_BYTES,
    AllReduceAlgorithm,
    AllReducePolicy,
    AllReduceTimings,
)
from lockstep.comm.base import CommError, Communicator, PeerMemoryUnavailable
from lockstep.comm.connect import map_peer_buffers, with_peer_memory
from lockstep.comm.rendezvous import Rendezvous
from lockstep.comm.timing import graph_us
from lockstep.kernels import ops
from lockstep.runtime import config
from lockstep.runtime.model.linear import RowLinear
from lockstep.runtime.model.norm import Residual
from lockstep.runtime.model.weights import Weights

from comm_failures import error_of, lose_last_rank
from rank_processes import PLACES, on_gpus, place_id, run_processes

KERNELS = Path(__file__).parents[2] / "kernels" / "csrc"
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HOST = "9a1f"


def import_without_cupy(name: str) -> Any:
    """A module of comm that imports kernels that need CuPy, also on a machine without it."""
    names = () if find_spec("cupy") else ("lockstep.kernels.peer_memory", "lockstep.kernels.cuda.gemm")
    stand_in = {module: ModuleType(module) for module in names}
    sys.modules.update(stand_in)
    try:
        return importlib.import_module(f"lockstep.comm.{name}")
    finally:
        for added in stand_in:
            del sys.modules[added]


peer_buffers, symmetric = import_without_cupy("peer_buffers"), import_without_cupy("symmetric")


class HostMemory:
    """The memory of all ranks in one process, and a log of the calls."""

    def __init__(self, size: int) -> None:
        self.memory: dict[int, Tensor] = {}
        self.log: list[str] = []
        self.here = threading.Barrier(size)


class HostPeers:
    """A stand-in for kernels/peer_memory.py of one rank, which is a thread; `faults` name its failures."""

    OPERATIONS, MAX_RANKS, FIRST, TIMEOUT_FIELD = ("barrier",), 8, 4096, 10
    NUM_INBOXES, EMPTY_BYTE = 4, 255

    def __init__(self, shared: HostMemory, rank: int, faults: set[str]) -> None:
        self.shared, self.rank, self.faults = shared, rank, faults

    def PeerTable(self, fields: Tensor, size: int, max_blocks: int, inbox_bytes: int) -> SimpleNamespace:  # a class
        return SimpleNamespace(max_blocks=max_blocks, inbox_bytes=inbox_bytes)

    def allocate(self, nbytes: int, device: Any) -> tuple[int, Tensor]:
        if "no memory" in self.faults:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory\nsecond line")
        whole = torch.zeros(nbytes, dtype=torch.uint8)
        self.shared.memory[whole.data_ptr()] = whole
        return whole.data_ptr(), whole

    def free(self, pointer: int) -> None:
        del self.shared.memory[pointer]
        self.shared.log.append("free")

    def export(self, pointer: int) -> bytes:
        return pointer.to_bytes(64, "little")

    def map_memory(self, handle: bytes, device: Any) -> int:
        if "no mapping" in self.faults:
            raise RuntimeError("cudaErrorInvalidValue: invalid argument")
        pointer = int.from_bytes(handle, "little")
        if "mirror" in self.faults:
            pointer = self.allocate(len(self.shared.memory[pointer]), device)[0]
        self.shared.log.append("map")
        return pointer

    def unmap(self, pointer: int) -> None:
        self.shared.log.append("unmap")

    def host_words(self, count: int) -> Tensor:
        self.words = torch.zeros(count, dtype=torch.int64)
        return self.words

    def max_blocks(self, device: Any, ranks: int) -> int:
        return 36 - self.rank

    def first_buffer(self, size: int) -> int:
        return self.FIRST

    def first_inbox(self, size: int, buffer_bytes: int) -> int:
        return self.FIRST + 3 * buffer_bytes

    def capture(self) -> int:
        return 0

    def prepare(self, size: int) -> None:
        return

    def table_fields(self, arenas: list[int], words: Tensor, **fields: Any) -> list[int]:
        self.arenas = arenas
        return [*arenas, *[0] * (14 - len(arenas))]

    def all_gather(self, out: Tensor, x: Tensor, peers: Any, slot: int, operation: str) -> None:
        """Do as the kernel, with a barrier of threads in place of the flags."""
        start, memory = self.FIRST, self.shared.memory
        memory[self.arenas[self.rank]][start : start + len(x)] = x
        if "deaf" in self.faults:
            self.words[1 - self.rank] = 7
        self.shared.here.wait(20)
        out.copy_(torch.cat([memory[pointer][start : start + len(x)] for pointer in self.arenas]))
        self.shared.here.wait(20)


class PeersOfThread(threading.local):
    """The HostPeers of the calling thread, in place of the module."""

    peers: HostPeers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peers, name)


Share = Callable[..., tuple[list[Any], HostMemory]]


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> Share:
    """Return the result or error of `map_peer_buffers`, or of `then(its buffers)`, on each rank, with faults."""
    here = PeersOfThread()

    def host() -> str:
        if "no cupy" in here.peers.faults:
            raise ImportError("No module named 'cupy'")
        return HOST + "0" * ("elsewhere" in here.peers.faults)

    monkeypatch.setattr(peer_buffers, "peer_memory", here)
    monkeypatch.setattr(symmetric, "peer_memory", here)
    monkeypatch.setattr(connecting, "_host", host)

    def run(
        size: int, faults: dict[int, set[str]], then: Callable[[Any], Any] = lambda buffers: buffers
    ) -> tuple[list[Any], HostMemory]:
        memory, store = HostMemory(size), HashStore()

        def rank(number: int) -> Any:
            here.peers = HostPeers(memory, number, faults.get(number, set()))
            options: dict[str, Any] = {"device": CPU, "buffer_bytes": 8192, "shares_device": True}
            try:
                if "absent" in here.peers.faults:
                    return None
                rendezvous = Rendezvous(store, number, size, 2.0)
                return then(map_peer_buffers(Recorder(number, size), rendezvous, **options)._buffers)  # type: ignore[arg-type]
            except RuntimeError as error:
                return error

        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(rank, range(size))), memory

    return run


# --- buffers and policies --------------------------------------------------------------------------------------------


def indices_of(turns: peer_buffers.BufferRotation, graph: int, length: int) -> list[int]:
    return [turns.take(graph) for _ in range(length)]


def test_buffer_that_may_still_be_read_is_not_written() -> None:
    """In any order of graphs and eager calls, buffers 1 and 2 are never used twice in a row."""
    numbers, turns = itertools.count(1), peer_buffers.BufferRotation()
    graphs = [indices_of(turns, next(numbers), length) for length in range(1, 6)]
    eager = [indices_of(turns, 0, length) for length in (1, 2)]
    for order in itertools.product([*graphs, *eager], repeat=3):
        run = [index for part in order for index in part]
        assert all(b != a or a == 0 for a, b in itertools.pairwise(run)), run
    assert all(index == 0 for index in eager[1])
    assert graphs[4] == [0, 1, 2, 1, 2]


def test_peek_takes_no_buffer() -> None:
    turns = peer_buffers.BufferRotation()
    for graph in (0, 4, 4, 4, 0, 5, 5, 0):
        assert turns.peek(graph) == turns.peek(graph) == turns.take(graph)


def test_constants_are_those_of_the_kernels() -> None:
    source, host = (KERNELS / "peer_protocol.cuh").read_text(), (KERNELS.parent / "peer_memory.py").read_text()

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    values = re.search(r"HEADER_BYTES, PUSH_BYTES, UNIT, BLOCKS = (\d+), (\d+), (\d+), (\d+)", host)
    assert values is not None
    mirrored = SimpleNamespace(
        **dict(zip(("HEADER_BYTES", "PUSH_BYTES", "UNIT", "BLOCKS"), map(int, values.groups()), strict=True))
    )
    assert number(r"RANKS = (\d+)", source) == number(r"MAX_RANKS = (\d+)", host) == HostPeers.MAX_RANKS
    for name in ("HEADER_BYTES", "PUSH_BYTES", "UNIT", "BLOCKS"):
        assert number(rf"\b{name} = (\d+)", source) == getattr(mirrored, name)
    assert mirrored.PUSH_BYTES == PUSH_BYTES
    blocks, ranks = mirrored.BLOCKS, number(r"RANKS = (\d+)", source)
    assert 4 * (blocks * ranks + blocks + 4) <= mirrored.HEADER_BYTES  # struct Header
    threads = {
        int(bound)
        for bound in re.findall(r"__launch_bounds__\((\d+), 1\)", (KERNELS / "peer_collectives.cu").read_text())
    }
    assert threads == {number(r"\nTHREADS = (\d+)", host)}


@given(st.lists(st.tuples(*[st.floats(1, 1e4)] * 3), min_size=1, max_size=8))
def test_policy_takes_the_fastest_at_the_next_size_that_was_timed(times: list[tuple[float, float, float]]) -> None:
    sizes = [64 << (2 * n) for n in range(len(times))]
    names: tuple[AllReduceAlgorithm, ...] = ("nccl", "one-shot", "two-shot")
    table = AllReduceTimings(sizes, dict(zip(names, map(list, zip(*times, strict=True)), strict=True)))
    policy = AllReducePolicy(tuple(table.thresholds()))
    for nbytes in {size + step for size in (1, *sizes) for step in (-1, 0, 1)}:
        column = next((n for n, size in enumerate(sizes) if nbytes <= size), None)
        fastest = "nccl" if column is None else names[times[column].index(min(times[column]))]
        assert policy.algorithm(nbytes, torch.bfloat16) == ("nccl" if nbytes == 0 else fastest)


def test_policy_of_one_algorithm_serves_what_fits_into_a_buffer() -> None:
    algorithms: tuple[AllReduceAlgorithm, ...] = ("one-shot", "two-shot")
    for algorithm in algorithms:
        policy = AllReducePolicy.only(algorithm)
        assert {policy.algorithm(n, torch.float32) for n in (1, 4096, BUFFER_BYTES)} == {algorithm}
        assert policy.algorithm(BUFFER_BYTES + 1, torch.float32) == "nccl"
        assert policy.algorithm(4096, torch.int64) == "nccl"
    assert BUFFER_BYTES % 16 == 0


def test_policy_slices_rows_of_more_than_a_buffer() -> None:
    policy = AllReducePolicy.batch_invariant("one-shot", 2, 64)
    x = torch.arange(30.0).view(10, 3)  # 12 bytes a row: five rows a slice
    assert [len(part) for part in policy.sliced(x)] == [5, 5]
    assert torch.equal(torch.cat(policy.sliced(x)), x)
    assert policy.sliced(x)[0].data_ptr() == x.data_ptr(), "views, of a residual that is updated in place"
    assert len(policy.sliced(x[:5])) == 1
    assert len(AllReducePolicy.only("one-shot", 64).sliced(x)) == 1
    assert str(policy) == "one-shot up to 0.1 KiB, and in slices beyond"


def test_sums_are_batch_invariant_if_all_algorithms_have_the_same_bits() -> None:
    assert (
        str(AllReducePolicy.batch_invariant("auto", 2))
        == "push up to 256 KiB, one-shot up to 64 MiB, and in slices beyond"
    )
    assert AllReducePolicy.batch_invariant("push", 4) == AllReducePolicy.batch_invariant("auto", 2)
    assert str(AllReducePolicy.batch_invariant("auto", 4)) == "two-shot up to 64 MiB, and in slices beyond"


def test_push_serves_small_messages_only() -> None:
    assert AllReducePolicy.only("push").algorithm(PUSH_BYTES, torch.bfloat16) == "push"
    assert AllReducePolicy.only("push").algorithm(PUSH_BYTES + 1, torch.bfloat16) == "nccl"


def test_config_option_has_the_choices_of_the_policy() -> None:
    assert get_args(AllReduceChoice) == get_args(config.AllReduceChoice)
    with pytest.raises(ValueError, match=r"^all_reduce='ring' is not one of auto, nccl, push, one-shot, two-shot$"):
        config.Config(all_reduce="ring")  # type: ignore[arg-type]


# --- setup and end ----------------------------------------------------------------------------------------------------


def test_ranks_share_their_memory_and_free_it(share: Share) -> None:
    def gather(buffers: Any) -> tuple[int, Tensor]:
        x = buffers.input((4, 8), torch.bfloat16)
        x.fill_(buffers.rank)
        comm = symmetric.SymmetricCommunicator(Recorder(buffers.rank, buffers.size), buffers, AllReducePolicy(()), CPU)
        result = buffers.peers.max_blocks, comm.all_gather(x)
        buffers.close()
        return result

    results, memory = share(3, {}, gather)
    for blocks, gathered in results:
        assert blocks == 34  # the least that a rank offered
        assert torch.equal(gathered[:, 0, 0].int(), torch.arange(3, dtype=torch.int32))
    assert memory.log == ["map"] * 6 + ["unmap"] * 6 + ["free"] * 3
    assert not memory.memory


def test_buffers_do_not_overlap(share: Share) -> None:
    def starts(buffers: Any) -> tuple[list[int], int]:
        views = []
        for index in range(3):
            buffers._rotation = SimpleNamespace(peek=lambda graph_id, index=index: index)
            views.append(buffers.input((8192,), torch.uint8))
        assert buffers._bytes.data_ptr() == buffers._address
        return [view.data_ptr() - buffers._address for view in views], len(buffers._bytes)

    offsets, nbytes = share(2, {}, starts)[0][0]
    assert offsets == [4096, 4096 + 8192, 4096 + 2 * 8192]
    assert nbytes % peer_buffers.GRANULE == 0


REFUSALS = {
    "elsewhere": "the ranks are on several hosts",
    "no cupy": "rank 1: No module named 'cupy'",
    "no memory": "rank 1: cudaErrorMemoryAllocation: out of memory",
    "no mapping": "rank 1: cannot map the memory of rank 0 (cudaErrorInvalidValue: invalid argument)",
    "mirror": "rank 1: the memory of rank 0, 2 reads differently here",
    "deaf": "rank 1: writes of rank 0 do not arrive",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_failure_of_one_rank_refuses_peer_memory_on_all(fault: str, share: Share) -> None:
    errors, memory = share(3, {1: {fault}})
    assert {str(error) for error in errors} == {REFUSALS[fault]}
    assert all(isinstance(error, PeerMemoryUnavailable) for error in errors)
    assert memory.log.count("map") == memory.log.count("unmap")
    assert len(memory.memory) == (2 if fault == "mirror" else 0)  # the mirror's copies belong to the test


def test_nccl_p2p_disable_is_respected(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    errors, _ = share(2, {})
    assert {str(error) for error in errors} == {"rank 0: NCCL_P2P_DISABLE is set; rank 1: NCCL_P2P_DISABLE is set"}


def test_host_is_the_boot_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "BOOT_ID", SimpleNamespace(read_text=lambda: f"{HOST}\n"))
    assert connecting._host() == HOST


def test_absent_rank_is_named(share: Share) -> None:
    errors, _ = share(3, {1: {"absent"}})
    assert isinstance(errors[0], CommError)
    assert str(errors[0]) == "rank 0 of 3: no message within 2 s from rank 1"


def test_memory_that_a_peer_may_still_use_is_not_freed(
    share: Share, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_buffers, "CLOSE_S", 0.3)
    _, memory = share(2, {}, lambda buffers: buffers.close() if buffers.rank == 0 else None)
    assert "free" not in memory.log
    assert len(memory.memory) == 2
    assert "mapped until the process ends: rank 0 of 2: no message within 0 s from rank 1" in caplog.text


# --- one rank of the group --------------------------------------------------------------------------------------------


class Recorder(Communicator):
    """A stand-in for NCCL that records its calls."""

    description, capturable = "NCCL", True

    def __init__(self, rank: int = 0, size: int = 2) -> None:
        self.rank, self.size = rank, size
        self.calls: list[str] = []

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls.append("all_reduce")
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self.calls.append("all_gather")
        return x

    def barrier(self) -> None:
        self.calls.append("barrier")

    def wait(self, done: Any) -> None:
        while not done.query():
            time.sleep(0.001)

    def abort(self) -> None:
        self.calls.append("abort")


class RecordingBuffers:
    """A stand-in for PeerBuffers that records its calls, and reports a timeout if it is given one."""

    timeout_s, peers = 1.8, SimpleNamespace(fields=None)

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lost: Any = None
        self.shares_device = False

    def input(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.calls.append("input")
        return torch.empty(shape, dtype=dtype)

    def take_buffer_index(self) -> int:
        return 0

    def timeout(self) -> Any:
        return self.lost

    def stop(self) -> None:
        self.calls.append("stop")


Rank = tuple[Any, RecordingBuffers, Recorder]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """A SymmetricCommunicator over stand-ins; launches of kernels are recorded with the calls of the buffers."""
    nccl, buffers = Recorder(), RecordingBuffers()

    def recorded(name: str) -> Callable[..., None]:
        def launch(*_: Any, two_shot: bool = False) -> None:
            buffers.calls.append(name + (" two-shot" if two_shot else ""))

        return launch

    sums = ("push_all_reduce", "one_shot_all_reduce", "two_shot_all_reduce", "all_gather")
    norms = ("push_all_reduce_", "two_push_", "receive_")
    names = (*sums, "all_reduce_add_rms_norm", *(f"{name}add_rms_norm" for name in norms))
    fits: dict[str, Any] = {"fits_norm": lambda columns, dtype: columns < 4096, "fits_push": lambda n: n % 16 == 0}
    fits["fits_two_pushes"] = lambda rows, columns, dtype, peers: rows * columns * dtype.itemsize <= 2048
    peers = SimpleNamespace(**fits, **{name: recorded(name) for name in names})
    monkeypatch.setattr(symmetric, "peer_memory", peers)
    gemms = SimpleNamespace(can_send=lambda x, weight: len(x) < 4, send_linear=recorded("send_linear"))
    monkeypatch.setattr(symmetric, "gemm", gemms)
    policy = AllReducePolicy(((256, "push"), (1024, "one-shot"), (4096, "two-shot")), 2048)
    return symmetric.SymmetricCommunicator(nccl, buffers, policy, CPU), buffers, nccl


def test_size_and_dtype_choose_the_algorithm(rank: Rank) -> None:
    comm, buffers, nccl = rank

    def calls_of(call: Callable[[], Any]) -> str:
        buffers.calls.clear()
        nccl.calls.clear()
        call()
        return ", ".join([*buffers.calls, *(f"nccl {name}" for name in nccl.calls)])

    def bf16(n: int) -> Tensor:
        return torch.ones(n, dtype=torch.bfloat16)

    assert calls_of(lambda: comm.all_reduce(bf16(128))) == "push_all_reduce"
    assert calls_of(lambda: comm.all_reduce(bf16(127))) == "one_shot_all_reduce", "no whole vectors"
    assert calls_of(lambda: comm.all_reduce(bf16(512))) == "one_shot_all_reduce"
    assert calls_of(lambda: comm.all_reduce(bf16(513))) == "two_shot_all_reduce"
    assert calls_of(lambda: comm.all_reduce(bf16(2049))) == "nccl all_reduce"
    assert calls_of(lambda: comm.all_reduce(bf16(0))) == "nccl all_reduce"
    assert calls_of(lambda: comm.all_reduce(torch.ones(4, dtype=torch.int64))) == "nccl all_reduce"
    assert calls_of(lambda: comm.all_gather(torch.ones(4, dtype=torch.int64))) == "all_gather"
    assert calls_of(lambda: comm.all_gather(bf16(1025))) == "nccl all_gather"
    assert calls_of(lambda: comm.buffer(2, 256, torch.bfloat16)) == "input"
    assert calls_of(lambda: comm.buffer(2, 2048, torch.bfloat16)) == ""
    assert calls_of(lambda: comm.buffer(4, 36, torch.bfloat16)) == "input", "no whole vectors in a row"
    for rows, columns in ((0, 256), (2, 64), (1, 64)):
        assert comm.buffer(rows, columns, torch.bfloat16) is None


def test_norm_is_fused_if_a_row_fits(rank: Rank) -> None:
    comm, buffers, nccl = rank

    def complete(rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        x, residual, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
        expected = residual.clone()
        norm = ops.add_rms_norm(x, expected, weight, 1e-5)
        result = comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
        return result, norm, residual - expected

    for rows in (1, 2, 8, 12):
        complete(rows, 64)
    norms = ("push_all_reduce_{}", "all_reduce_{}", "two_push_{}", "all_reduce_{} two-shot")
    assert buffers.calls == [name.format("add_rms_norm") for name in norms]
    result, norm, difference = complete(1, 4096)  # NCCL's stand-in returns x itself: the sum of one rank
    assert nccl.calls == ["all_reduce"]
    assert torch.equal(result, norm)
    assert not difference.any()


GEMMS = AllReducePolicy(((256, "push"), (1024, "one-shot"), (4096, "two-shot")), gemm_bytes=1024)
STORED = ["push_all_reduce_add_rms_norm"]
SENT = ["send_linear", "receive_add_rms_norm"]


@pytest.mark.parametrize(
    ("rows", "columns", "options", "expected"),
    [
        (1, 64, {}, SENT),
        (3, 64, {}, SENT),  # instead of one-shot
        (5, 64, {}, STORED),  # the GEMM of this rank cannot send it, that of another may
        (1, 64, {"dtype": torch.float32}, STORED),
        (3, 64, {"dtype": torch.float32}, ["input", "all_reduce_add_rms_norm"]),
        (9, 32, {}, ["input", "all_reduce_add_rms_norm"]),
        (8, 128, {}, ["input", "two_push_add_rms_norm"]),
        (3, 100, {}, ["input", "all_reduce_add_rms_norm"]),  # no whole vectors
        (3, 64, {"batch_invariant": True}, ["input", "all_reduce_add_rms_norm"]),
        (3, 64, {"shares_device": True}, ["input", "all_reduce_add_rms_norm"]),
        (3, 64, {"policy": replace(GEMMS, gemm_bytes=0)}, ["input", "all_reduce_add_rms_norm"]),
    ],
)
def test_gemm_sends_its_sum_where_push_or_one_shot_serves_it(
    rows: int, columns: int, options: dict[str, Any], expected: list[str], rank: Rank
) -> None:
    comm, buffers, _ = rank
    buffers.shares_device = options.get("shares_device", False)
    comm = comm.with_policy(options.get("policy", GEMMS))
    dtype = options.get("dtype", torch.bfloat16)
    x, weight, residual = (
        torch.ones(rows, 8, dtype=dtype),
        torch.ones(columns, 8, dtype=dtype),
        torch.ones(rows, columns),
    )
    partial = comm.linear(x, weight, None, batch_invariant=options.get("batch_invariant", False))
    assert partial.shape == residual.shape
    out = comm.all_reduce_add_rms_norm(partial, residual.to(dtype), torch.ones(columns, dtype=dtype), 1e-5)
    assert (out.shape, out.dtype, out.device) == (residual.shape, dtype, residual.device)
    assert buffers.calls == expected


def test_sum_that_a_gemm_has_sent_is_for_the_norm_only(rank: Rank) -> None:
    x, weight = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(64, 8, dtype=torch.bfloat16)
    comm = rank[0].with_policy(GEMMS)
    sent = comm.linear(x, weight, None)
    for call in (
        lambda: comm.all_reduce(sent),
        lambda: comm.all_gather(sent),
        lambda: comm.linear(x, weight, None),
        lambda: comm.all_reduce_add_rms_norm(torch.ones_like(sent, device="cpu"), sent, weight, 1e-5),
        comm.barrier,
    ):
        with pytest.raises(RuntimeError, match="must be that of the next collective"):
            call()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        (sent + weight.new_ones(64)).tolist()


def test_gemms_push_only_with_push_among_the_algorithms() -> None:
    times = AllReduceTimings([8192, 262144], {"nccl": [9.0, 9.0], "push": [3.0, 4.0], "one-shot": [3.1, 3.9]})
    policy = AllReducePolicy.auto(times)
    assert [policy.lets_gemms_push(rows, 8192, torch.bfloat16) for rows in (1, 8, 9)] == [True, True, False]
    assert not policy.lets_gemms_push(8, 8200, torch.bfloat16), "more than 128 KiB"
    assert not AllReducePolicy.auto(times.without(["push"])).lets_gemms_push(1, 4096, torch.bfloat16)
    for choice in ALL_REDUCE_ALGORITHMS:
        sums = AllReducePolicy.only(choice), AllReducePolicy.batch_invariant(choice, 2)
        assert [p.lets_gemms_push(1, 4096, torch.bfloat16) for p in sums] == [choice == "push", False]


@pytest.mark.parametrize(
    ("steps", "gemms"),
    [
        (((32 << 10, "push"), (256 << 10, "one-shot")), ", GEMMs push up to 64 KiB"),
        (((16 << 10, "one-shot"), (1 << 20, "two-shot")), ", GEMMs push up to 16 KiB"),
        (((128 << 10, "two-shot"), (256 << 10, "push")), ""),
        (((1 << 20, "two-shot"),), ""),
    ],
)
def test_description_says_what_gemms_push(steps: tuple[tuple[int, AllReduceAlgorithm], ...], gemms: str) -> None:
    policy = AllReducePolicy(steps, gemm_bytes=64 << 10)
    assert str(policy).partition(" and NCCL beyond")[2] == gemms
    assert str(policy).endswith(gemms or "NCCL beyond")


def test_misaligned_residual_is_updated_in_place(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    comm, _, _ = rank

    def fill(out: Tensor, x: Tensor, residual: Tensor, *_: Any, **__: Any) -> None:
        assert x.data_ptr() % 16 == residual.data_ptr() % 16 == 0
        residual.fill_(3.0)

    monkeypatch.setattr(symmetric.peer_memory, "all_reduce_add_rms_norm", fill)
    monkeypatch.setattr(symmetric.peer_memory, "push_all_reduce_add_rms_norm", fill)
    residual = torch.zeros(17)[1:].view(2, 8)
    comm.all_reduce_add_rms_norm(torch.zeros(17)[1:].view(2, 8), residual, torch.ones(8), 1e-5)
    assert (residual == 3.0).all()


def test_peer_timeout_ends_the_group(rank: Rank) -> None:
    comm, buffers, nccl = rank

    class Ready:
        def query(self) -> bool:
            return True

    comm.wait(Ready())
    comm.wait(Ready())
    buffers.lost = peer_buffers.PeerTimeout([1, 3], "all_gather", 77)
    message = "rank 0 of 2: all_gather in step 3 has waited 1.8 s for rank 1, 3, which is gone or silent (round 77)"
    assert error_of(lambda: comm.wait(Ready())) == message
    assert "stop" in buffers.calls
    assert "abort" in nccl.calls
    assert error_of(lambda: comm.all_reduce(torch.ones(4))) == message


def test_device_that_hangs_is_checked_during_the_wait(rank: Rank) -> None:
    comm, buffers, _ = rank

    class Never:
        def query(self) -> bool:
            buffers.lost = peer_buffers.PeerTimeout([1], "all_reduce", 5)
            return False

    assert "for rank 1, which is gone or silent" in error_of(lambda: comm.wait(Never()))


def test_aborted_group_raises_on_every_call(rank: Rank) -> None:
    comm, buffers, _ = rank
    comm.abort()
    assert buffers.calls == ["stop"]
    for call in (lambda: comm.all_reduce(torch.ones(4)), comm.barrier, lambda: comm.all_gather(torch.ones(1))):
        assert error_of(call) == "rank 0 of 2: the group has ended"


def test_nccl_alone_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PeerMemoryUnavailable("rank 1: NCCL_P2P_DISABLE is set")

    monkeypatch.setattr(connecting, "map_peer_buffers", refuse)
    rendezvous, options = (
        Rendezvous(HashStore(), 0, 2, 1.0),
        {"shape": RowShape(64, torch.float32, CPU), "shares_device": False},
    )
    nccl: Any = Recorder()
    assert with_peer_memory(nccl, "auto", rendezvous, **options) is nccl  # type: ignore[arg-type]
    assert nccl.description == "NCCL; no peer memory: rank 1: NCCL_P2P_DISABLE is set"
    with pytest.raises(CommError, match=r"^batch-invariant sums need peer memory: rank 1: NCCL_P2P"):
        with_peer_memory(nccl, "auto", rendezvous, batch_invariant=True, **options)  # type: ignore[arg-type]
    untouched: Any = Recorder()
    assert with_peer_memory(untouched, "nccl", rendezvous, **options) is untouched  # type: ignore[arg-type]
    assert untouched.description == "NCCL"


# --- GEMMs that write into a buffer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_writes_into_out(with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5) if with_bias else None
    out = torch.full((3, 5), float("nan"))
    assert ops.linear(x, weight, bias, out=out) is out
    assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("out", "options"),
    [
        (torch.empty(3, 4), {}),
        (torch.empty(5, 3).t(), {}),
        (torch.empty(3, 5, dtype=torch.bfloat16), {}),
        (torch.empty(3, 5), {"add_to": torch.empty(3, 5)}),
    ],
)
def test_linear_refuses_an_out_that_does_not_fit(out: Tensor, options: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be \[3, 5\] torch.float32, contiguous, not gated, and alone"):
        ops.linear(torch.ones(3, 8), torch.ones(5, 8), out=out, **options)


def test_row_linear_writes_into_the_buffer_of_the_communicator() -> None:
    class Buffered(Recorder):
        def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            self.place = torch.empty(rows, columns, dtype=dtype)
            return self.place

    torch.manual_seed(0)
    comm = Buffered()
    layer = RowLinear(Weights(torch.float32, CPU), comm, "o_proj", 6, 16, slice(0, 8), bias=False)
    layer.weight.normal_()
    x, residual = torch.randn(3, 8), Residual(torch.zeros(3, 6))
    layer(x, residual)
    assert residual.partial is comm.place
    assert torch.equal(comm.place, torch.nn.functional.linear(x, layer.weight))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SIZES = (0, 1, 7, 8, 63, 4096, 4099, 65536 + 8, 1 << 20, (1 << 22) + 1, 1 << 24)  # elements; 64 MiB in float32
NORMS = [(1, 64), (1, 8192), (3, 1000), (40, 4096), (700, 4096), (256, 5120), (3000, 256), (5, 501), (2, 16384)]


@pytest.fixture(params=PLACES, ids=place_id)
def shared(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """The number of ranks, which are processes on one or more GPUs, and the options of `connect`."""
    size, gpus = request.param
    return size, {**on_gpus(size, gpus), "all_reduce": "auto"}


def part(rank: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers of a rank, equal on every rank that makes them."""
    generator = torch.Generator("cuda").manual_seed(rank + 31 * sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    """Return their sum in float32 and in rank order, rounded once."""
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other.float()
    return total.to(parts[0].dtype)


def reached(comm: Communicator) -> None:
    done = torch.cuda.Event()
    done.record()
    comm.wait(done)


def connected(comm: Communicator) -> Any:
    assert isinstance(comm, symmetric.SymmetricCommunicator), comm.description
    assert "other sums" not in comm.description, comm.description
    return comm


def gpu_collectives(comm: Communicator) -> list[str]:
    """Compare all collectives with torch, bit by bit unless NCCL serves them; return the names that differ."""
    comm, wrong = connected(comm), []
    me, size = comm.rank, comm.size

    def expect(name: str, found: Tensor, expected: Tensor, exact: bool = True) -> None:
        tolerance = {} if exact else {"rtol": 2e-2, "atol": 6e-2}
        same = torch.equal(found, expected) if exact else torch.allclose(found, expected, **tolerance)
        if not same or found.shape != expected.shape:
            wrong.append(f"rank {me}: {name} {expected.dtype} {list(expected.shape)}")

    for dtype, numel in itertools.product(FLOATS, SIZES):
        every = [part(rank, numel, dtype=dtype) for rank in range(size)]
        algorithm = comm._algorithm(numel * dtype.itemsize, dtype)
        small = algorithm != "nccl"
        total = in_order(every)
        expect("all_reduce", comm.all_reduce(every[me].clone()), total, small)
        buffer = comm.buffer(1, numel, dtype)
        assert (buffer is None) == (algorithm in ("nccl", "push"))
        if buffer is not None:
            expect("all_reduce of a buffer", comm.all_reduce(buffer.copy_(every[me])), total[None])
        if small:
            odd = torch.empty(numel + 1, dtype=dtype, device="cuda")[me % 2 :][:numel].copy_(every[me])
            expect("all_reduce, misaligned on some", comm.all_reduce(odd), total)
            expect("all_gather, misaligned on some", comm.all_gather(odd), torch.stack(every))
        expect("all_gather", comm.all_gather(every[me]), torch.stack(every))
    comm.barrier()
    comm.close()
    return wrong


def gpu_norms(comm: Communicator) -> tuple[list[str], list[Tensor]]:
    """Compare all-reduce + residual + RMSNorm with float32 in torch; returns the differences and the results."""
    comm = connected(comm)
    me, size, wrong, results = comm.rank, comm.size, [], []
    for dtype, (rows, columns), buffered in itertools.product(FLOATS, NORMS, (False, True)):
        every = [part(rank, rows, columns, dtype=dtype) for rank in range(size)]
        residual, weight = part(90, rows, columns, dtype=dtype), part(91, columns, dtype=dtype)
        total = residual.float() + sum(x.float() for x in every)
        x = comm.buffer(rows, columns, dtype) if buffered else None
        x = torch.empty_like(residual) if x is None else x
        out = comm.all_reduce_add_rms_norm(x.copy_(every[me]), residual, weight, 1e-5)
        expected = torch.nn.functional.rms_norm(total, (columns,), weight.float(), 1e-5)
        # Two roundings of the sum (two-shot rounds it before the residual is added), one of the result.
        tolerance = 4 * torch.finfo(dtype).eps
        for name, found, exact in (("residual", residual, total), ("norm", out, expected)):
            if not torch.allclose(found.float(), exact, rtol=tolerance, atol=tolerance * 8):
                wrong.append(f"rank {me}: {name} {dtype} {rows} x {columns}")
        results += [out.cpu(), residual.cpu()]
    comm.close()
    return wrong, results


def gpu_same_bits(comm: Communicator) -> list[str]:
    """Return the shapes whose push and one-shot differ in a bit, of one row alone and of a batch."""
    comm, differing = connected(comm), []
    push, one_shot = (comm.with_policy(AllReducePolicy.only(algorithm)) for algorithm in ("push", "one-shot"))
    for dtype, (rows, columns) in itertools.product(FLOATS, NORMS):
        x, before = part(comm.rank, rows, columns, dtype=dtype), part(90, rows, columns, dtype=dtype)
        residual, weight = before.clone(), part(91, columns, dtype=dtype)
        out = one_shot.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
        for row in {0, rows // 2, rows - 1}:
            one = before[row : row + 1].clone()
            pushed = push.all_reduce_add_rms_norm(x[row : row + 1], one, weight, 1e-5)
            if not (torch.equal(pushed[0], out[row]) and torch.equal(one[0], residual[row])):
                differing.append(f"{dtype} {rows} x {columns}, row {row}")
    comm.close()
    return differing


def gpu_sums_of_gemms(comm: Communicator) -> list[str]:
    """Return the products whose sums differ in a bit from a push of the stored ones."""
    comm, differing = connected(comm), []
    assert comm.gemms_push(8, 8192, torch.bfloat16) == (not comm._buffers.shares_device)
    shapes = (4096, 512), (1000, 512), (8192, 512), (1000, 14336)  # 8 rows of the last one are not staged
    for dtype, rows, shape, stores in itertools.product(FLOATS[1:], (1, 3, 8), shapes, (False, True)):
        if count := differing_sums_of_gemms(comm, rows, *shape, dtype, stores):
            differing.append(f"{dtype} {rows} rows of {shape}, stored on rank 1: {stores}: {count}")
    comm.close()
    return differing


def differing_sums_of_gemms(comm: Any, rows: int, columns: int, share: int, dtype: torch.dtype, stores: bool) -> int:
    """Return how many elements differ, in calls and in a graph; if `stores`, the GEMM of rank 1 does not send.

    share  columns of x on ranks with even numbers; the others have more
    """
    share, turn = share + 128 * (comm.rank % 2), torch.zeros(1, dtype=torch.int64, device="cuda")
    xs, weight = part(comm.rank, 3, rows, share, dtype=dtype), part(80 + comm.rank, columns, share, dtype=dtype)
    bias, norm = (part(seed, columns, dtype=dtype) for seed in (90, 91))
    before, wrong = part(92, rows, columns, dtype=dtype), torch.zeros((), dtype=torch.int64, device="cuda")
    first = int(stores and comm.rank == 1)  # then x is at no multiple of 16 bytes
    x = torch.empty(rows * share + 1, dtype=dtype, device="cuda")[first:][: rows * share].view(rows, share)

    def both() -> None:
        x.copy_(xs.index_select(0, turn)[0])
        stored, sent = before.clone(), before.clone()
        expected = comm.all_reduce_add_rms_norm(ops.linear(x, weight, bias), stored, norm, 1e-5)
        out = comm.all_reduce_add_rms_norm(comm.linear(x, weight, bias), sent, norm, 1e-5)
        wrong.add_((out != expected).sum() + (sent != stored).sum())
        turn.add_(1).remainder_(3)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        both()
    for _ in range(4):
        graph.replay()
    reached(comm)
    return int(wrong)


def gpu_check_with_a_fault(comm: Communicator) -> dict[str, str]:
    """Return what the check at start-up finds when the pushed norms of the last rank are wrong in one element."""
    comm, policy = connected(comm), AllReducePolicy(((PUSH_BYTES, "push"), (BUFFER_BYTES, "one-shot")))
    original = symmetric.peer_memory.push_all_reduce_add_rms_norm

    def with_fault(out: Tensor, *rest: Any) -> None:
        original(out, *rest)
        out[-1, -1] += comm.rank == comm.size - 1

    shape = RowShape(5120, torch.bfloat16, torch.device("cuda"))
    with mock.patch.object(symmetric.peer_memory, "push_all_reduce_add_rms_norm", with_fault):
        found = wrong_algorithms(comm.with_policy(policy), comm._nccl, policy, comm._buffers._rendezvous, shape, 99)
    comm.close()
    return found


def gpu_many(comm: Communicator) -> int:
    """Run 10,000 all-reduces with a rank that is slow at times; returns how many were wrong."""
    comm = connected(comm)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(10_000):
        if comm.rank == 1 and turn % 1000 == 0:
            time.sleep(0.02)
        numel = (8, 4096, 513)[turn % 3]
        x = torch.full((numel,), float(turn % 64 + comm.rank), device="cuda")
        wrong += (comm.all_reduce(x) != comm.size * (turn % 64) + sum(range(comm.size))).any()
        if turn % 500 == 0:
            reached(comm)
    reached(comm)
    comm.close()
    return int(wrong)


def gpu_graphs(comm: Communicator) -> int:
    """Mix graphs of 1 to 5 collectives on GEMMs in buffers with eager calls; returns how many were wrong."""
    comm = connected(comm)
    step, wrong = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    columns, ones = 1024, torch.ones(8, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(columns, 8, device="cuda", dtype=torch.bfloat16)

    def collective(place: int) -> None:
        scale = (step % 16 + comm.rank + place).to(torch.bfloat16)
        x = ops.linear(ones * scale, weight, out=comm.buffer(8, columns, torch.bfloat16))
        expected = 8 * (comm.size * (step % 16 + place) + sum(range(comm.size)))
        if place % 2:
            residual = torch.zeros_like(x)
            comm.all_reduce_add_rms_norm(x, residual, torch.ones_like(x[0]), 1e-5)
            wrong.add_((residual.float() != expected).any())
        else:
            wrong.add_((comm.all_reduce(x).float() != expected).any())

    def several(length: int) -> None:
        step.add_(1)
        for place in range(length):
            collective(place)

    graphs = []
    for length in (1, 2, 3, 4, 5):
        several(length)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], capture_error_mode="thread_local"):
            several(length)
    order = random.Random(0)
    for turn in range(600):
        if order.random() < 0.1:
            several(order.randint(1, 3))
        else:
            order.choice(graphs).replay()
        if comm.rank == turn % comm.size and turn % 50 == 0:
            time.sleep(0.01)
    reached(comm)
    del graphs
    comm.close()
    return int(wrong)


def gpu_us_with_a_late_rank(comm: Communicator) -> float:
    """Return the time of an all-reduce in a graph whose replays the last rank launches 50 ms late."""
    comm, x = connected(comm), torch.zeros(4096, device="cuda")
    barrier = comm.barrier

    def barrier_and_delay() -> None:
        barrier()
        time.sleep(0.05 if comm.rank == comm.size - 1 else 0)

    comm.all_reduce(x)  # loads the kernel
    with mock.patch.object(comm, "barrier", barrier_and_delay):
        us = graph_us(comm, lambda: comm.all_reduce(x), length=10, times=3)
    comm.close()
    return us


def gpu_loses(comm: Communicator, when: str, how: str, in_graph: bool) -> tuple[list[str], float, float]:
    return lose_last_rank(connected(comm), when, how, in_graph)


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["auto", "push", "one-shot", "two-shot"])
def test_gpu_collectives_against_torch(algorithm: str, shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_collectives, timeout_s=60, **{**options, "all_reduce": algorithm}) == [[]] * size


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["push", "one-shot", "two-shot"])
def test_gpu_norms_against_torch_are_bitwise_identical_on_all_ranks(
    algorithm: str, shared: tuple[int, dict[str, Any]]
) -> None:
    size, options = shared
    found = run_processes(size, gpu_norms, timeout_s=60, **{**options, "all_reduce": algorithm})
    assert [wrong for wrong, _ in found] == [[]] * size
    (_, first), *others = found
    for _, other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.gpu
def test_gpu_push_has_the_bits_of_one_shot(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_same_bits, timeout_s=60, **{**options, "all_reduce": "one-shot"}) == [[]] * size


@pytest.mark.gpu
def test_gpu_sums_of_gemms_have_the_bits_of_push(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_sums_of_gemms, timeout_s=60, **{**options, "all_reduce": "push"}) == [[]] * size


@pytest.mark.gpu
def test_gpu_check_finds_a_fault_of_one_kernel(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    for found in run_processes(size, gpu_check_with_a_fault, timeout_s=60, **{**options, "all_reduce": "one-shot"}):
        assert list(found) == ["push"]
        assert found["push"].startswith(f"rank {size - 1}: ")


@pytest.mark.gpu
def test_gpu_many_all_reduces_with_a_slow_rank(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_many, timeout_s=60, **options) == [0] * size


@pytest.mark.gpu
def test_gpu_times_leave_out_the_wait_for_a_late_rank(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    us = run_processes(size, gpu_us_with_a_late_rank, timeout_s=60, **{**options, "all_reduce": "one-shot"})
    assert max(us) * 30 < 50_000, us  # all timed calls together are shorter than the delay


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["auto", "push", "one-shot", "two-shot"])
def test_gpu_graphs_in_mixed_order(algorithm: str, shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_graphs, timeout_s=60, **{**options, "all_reduce": algorithm}) == [0] * size


@pytest.mark.gpu
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_gpu_survivors_name_the_lost_rank(
    when: str, how: str, in_graph: bool, shared: tuple[int, dict[str, Any]]
) -> None:
    size, options = shared
    job = partial(gpu_loses, when=when, how=how, in_graph=in_graph)
    *survivors, lost = run_processes(size, job, timeout_s=60, **options)
    assert lost is None
    for rank, ((told, later), told_s, busy_s) in enumerate(survivors):
        assert re.match(rf"rank {rank} of {size}: all_reduce in step \d+ has waited 1.5 s for rank {size - 1},", told)
        assert later == told
        assert told_s < 5
        assert busy_s < 6
