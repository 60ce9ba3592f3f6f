"""Shared memory between ranks: who writes where, how ranks agree and part, and, on a GPU, all of it with kernels.

Without a GPU the ranks are threads and the memory is the host's. The GPU tests share device 0 as those of test_nccl.py.
"""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore

from lockstep.comm import peer_buffers
from lockstep.comm.autotune import Algorithm, Table
from lockstep.comm.base import CommError, Communicator
from lockstep.comm.peer_buffers import Late, NotShared, PeerBuffers, SlotRotation, join
from lockstep.comm.symmetric import LARGEST, OWN, AllReduce, Policy, SymmetricCommunicator, share_memory
from lockstep.kernels import ops
from lockstep.runtime import config
from lockstep.runtime.model.linear import RowLinear
from lockstep.runtime.model.norm import Residual
from lockstep.runtime.model.weights import Weights

from comm_failures import error_of, lose_last_rank
from rank_processes import on_gpus, run_processes

KERNELS = Path(__file__).parents[2] / "kernels" / "csrc"
CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HOST = "9a1f"


class Shared:
    """The memory of all ranks, as one host sees it, and what they have done to it."""

    def __init__(self, size: int) -> None:
        self.memory: dict[int, Tensor] = {}
        self.log: list[str] = []
        self.here = threading.Barrier(size)


class HostPeers:
    """kernels/peer_memory.py for one rank that is a thread; `faults` are what goes wrong on it."""

    KINDS, MAX_RANKS, HEADER_BYTES, TIMEOUT_FIELD = ("barrier",), 8, 4096, 10

    def __init__(self, shared: Shared, rank: int, faults: set[str]) -> None:
        self.shared, self.rank, self.faults = shared, rank, faults

    def Group(self, table: Tensor, size: int, blocks: int) -> SimpleNamespace:  # a class of that name
        return SimpleNamespace(blocks=blocks)

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

    def capture(self) -> int:
        return 0

    def prepare(self, size: int) -> None:
        return

    def table(self, arenas: list[int], words: Tensor, **fields: Any) -> list[int]:
        self.arenas = arenas
        return [*arenas, *[0] * (14 - len(arenas))]

    def all_gather(self, out: Tensor, x: Tensor, group: Any, slot: int, kind: str) -> None:
        """What the kernel does, with a barrier of threads for the flags."""
        start, memory = self.HEADER_BYTES, self.shared.memory
        memory[self.arenas[self.rank]][start : start + len(x)] = x
        if "deaf" in self.faults:
            self.words[1 - self.rank] = 7
        self.shared.here.wait(20)
        out.copy_(torch.cat([memory[pointer][start : start + len(x)] for pointer in self.arenas]))
        self.shared.here.wait(20)


@pytest.fixture
def agree(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], Shared]]:
    """What `join`, or `then(arena)` after it, gives or raises on each rank, of which some have faults."""

    def run(
        size: int, faults: dict[int, set[str]], then: Callable[[PeerBuffers], Any] = lambda arena: arena
    ) -> tuple[list[Any], Shared]:
        shared, store, here = Shared(size), HashStore(), threading.local()

        def peers() -> HostPeers:
            if "no cupy" in here.peers.faults:
                raise ImportError("No module named 'cupy'")
            return here.peers  # type: ignore[no-any-return]

        def boot_id() -> str:
            return HOST + ("0" if "elsewhere" in here.peers.faults else "\n")

        monkeypatch.setattr(peer_buffers, "_peers", peers)
        monkeypatch.setattr(peer_buffers, "BOOT_ID", SimpleNamespace(read_text=boot_id))

        def rank(number: int) -> Any:
            here.peers = HostPeers(shared, number, faults.get(number, set()))
            options: dict[str, Any] = {"device": CPU, "slot_bytes": 8192, "shares_device": True, "timeout_s": 2.0}
            try:
                if "absent" in here.peers.faults:
                    return None
                return then(join(store, number, size, **options))
            except RuntimeError as error:
                return error

        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(rank, range(size))), shared

    return run


# --- who may write where ----------------------------------------------------------------------------------------------


def slots_of(turns: SlotRotation, graph: int, length: int) -> list[int]:
    return [turns.take(graph) for _ in range(length)]


def test_nobody_writes_into_a_slot_that_may_still_be_read() -> None:
    """Any graphs and eager calls in any order: a slot that is not waited for is never that of the collective before."""
    numbers, turns = itertools.count(1), SlotRotation()
    graphs = [slots_of(turns, next(numbers), length) for length in range(1, 6)]
    eager = [slots_of(turns, 0, length) for length in (1, 2)]
    for order in itertools.product([*graphs, *eager], repeat=3):
        run = [slot for part in order for slot in part]
        assert all(b != a or a == 0 for a, b in itertools.pairwise(run)), run
    assert all(slot == 0 for slot in eager[1])
    assert graphs[4] == [0, 1, 2, 1, 2]


def test_a_look_takes_no_slot() -> None:
    turns = SlotRotation()
    for graph in (0, 4, 4, 4, 0, 5, 5, 0):
        assert turns.peek(graph) == turns.peek(graph) == turns.take(graph)


def test_constants_are_those_of_the_kernels() -> None:
    source, host = (KERNELS / "allreduce.cu").read_text(), (KERNELS.parent / "peer_memory.py").read_text()

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text)[1])  # type: ignore[index]

    assert number(r"RANKS = (\d+)", source) == number(r"MAX_RANKS = (\d+)", host) == HostPeers.MAX_RANKS
    assert number(r"HEADER_BYTES = (\d+)", source) == number(r"HEADER_BYTES, UNIT = (\d+)", host) == 4096
    assert number(r"UNIT = (\d+)", source) == number(r"HEADER_BYTES, UNIT = \d+, (\d+)", host)
    blocks, ranks = number(r"BLOCKS = (\d+)", source), number(r"RANKS = (\d+)", source)
    assert number(r"MAX_BLOCKS = (\d+)", host) <= blocks
    assert 4 * (blocks * ranks + blocks + 1) <= 4096  # struct Header
    threads = {int(bound) for bound in re.findall(r"__launch_bounds__\((\d+), 1\)", source)}
    assert threads == {number(r"\nTHREADS = (\d+)", host)}


@given(st.lists(st.tuples(*[st.floats(1, 1e4)] * 3), min_size=1, max_size=8))
def test_a_policy_takes_the_fastest_at_the_next_size_that_was_timed(times: list[tuple[float, float, float]]) -> None:
    sizes = [64 << (2 * n) for n in range(len(times))]
    names: tuple[Algorithm, ...] = ("nccl", "one-shot", "two-shot")
    policy = Policy(tuple(Table(sizes, dict(zip(names, map(list, zip(*times, strict=True)), strict=True))).best()))
    for nbytes in {size + step for size in (1, *sizes) for step in (-1, 0, 1)}:
        column = next((n for n, size in enumerate(sizes) if nbytes <= size), None)
        fastest = "nccl" if column is None else names[times[column].index(min(times[column]))]
        assert policy.algorithm(nbytes) == fastest


def test_a_forced_algorithm_serves_what_fits_into_a_slot() -> None:
    for name in OWN:
        policy = Policy.only(name)
        assert {policy.algorithm(n) for n in (1, 4096, LARGEST)} == {name}
        assert policy.algorithm(LARGEST + 1) == "nccl"
    assert LARGEST % 16 == 0


def test_rows_of_more_than_a_slot_go_in_slices_where_no_one_else_may_add_up() -> None:
    policy = Policy.only("one-shot", 64, slices=True)
    x = torch.arange(30.0).view(10, 3)  # 12 bytes a row: five rows a slice
    assert [len(part) for part in policy.sliced(x)] == [5, 5]
    assert torch.equal(torch.cat(policy.sliced(x)), x)
    assert policy.sliced(x)[0].data_ptr() == x.data_ptr(), "views, of a residual that is updated in place"
    assert len(policy.sliced(x[:5])) == 1
    assert len(Policy.only("one-shot", 64).sliced(x)) == 1
    assert str(policy) == "one-shot up to 0 KiB, and in slices beyond"


def test_the_option_has_the_choices_of_the_policy() -> None:
    assert get_args(AllReduce) == get_args(config.AllReduce)
    with pytest.raises(ValueError, match=r"^all_reduce='ring' is not one of auto, nccl, one-shot, two-shot$"):
        config.Config(all_reduce="ring")  # type: ignore[arg-type]


# --- joining and parting ----------------------------------------------------------------------------------------------


def test_ranks_share_their_memory_and_part(agree: Callable[..., Any]) -> None:
    def visit(arena: PeerBuffers) -> tuple[int, Tensor]:
        x = arena.buffer((4, 8), torch.bfloat16)
        x.fill_(arena.rank)
        found = arena._group.blocks, arena.all_gather(x)
        arena.close()
        return found

    found, shared = agree(3, {}, visit)
    for blocks, gathered in found:
        assert blocks == 34  # the least that a rank offered
        assert torch.equal(gathered[:, 0, 0].int(), torch.arange(3, dtype=torch.int32))
    assert shared.log == ["map"] * 6 + ["unmap"] * 6 + ["free"] * 3
    assert not shared.memory


def test_slots_lie_apart(agree: Callable[..., Any]) -> None:
    arena = agree(2, {})[0][0]
    views = [arena._slot(slot, (8192,), torch.uint8) for slot in range(3)]
    starts = [view.data_ptr() - arena._bytes.data_ptr() for view in views]
    assert starts == [4096, 4096 + 8192, 4096 + 2 * 8192]
    assert len(arena._bytes) % peer_buffers.GRANULE == 0
    assert arena._bytes.data_ptr() == arena._own


REFUSALS = {
    "elsewhere": "the ranks are on several hosts",
    "no cupy": "rank 1: No module named 'cupy'",
    "no memory": "rank 1: cudaErrorMemoryAllocation: out of memory",
    "no mapping": "rank 1: cannot map the memory of rank 0 (cudaErrorInvalidValue: invalid argument)",
    "mirror": "rank 1: the memory of rank 0, 2 reads differently here",
    "deaf": "rank 1: what rank 0 writes does not arrive",
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_what_one_rank_cannot_do_none_does(fault: str, agree: Callable[..., Any]) -> None:
    found, shared = agree(3, {1: {fault}})
    assert {str(error) for error in found} == {REFUSALS[fault]}
    assert all(isinstance(error, NotShared) for error in found)
    assert shared.log.count("map") == shared.log.count("unmap")
    assert len(shared.memory) == (2 if fault == "mirror" else 0)  # the mirror's copies are the test's own


def test_a_wish_for_no_peer_memory_is_respected(agree: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    found, _ = agree(2, {})
    assert {str(error) for error in found} == {"rank 0: NCCL_P2P_DISABLE is set; rank 1: NCCL_P2P_DISABLE is set"}


def test_a_rank_that_does_not_come_is_named(agree: Callable[..., Any]) -> None:
    found, _ = agree(3, {1: {"absent"}})
    assert isinstance(found[0], CommError)
    assert str(found[0]) == "rank 0 of 3: no word within 2 s from rank 1"


def test_memory_that_a_peer_may_still_use_is_not_freed(
    agree: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_buffers, "CLOSE_S", 0.3)
    _, shared = agree(2, {}, lambda arena: arena.close() if arena.rank == 0 else None)
    assert "free" not in shared.log
    assert len(shared.memory) == 2
    assert "left to the end of the process: rank 0 of 2: no word within 0 s from rank 1" in caplog.text


# --- one rank of the group --------------------------------------------------------------------------------------------


class Recorder(Communicator):
    """Stands for NCCL: says what was asked of it."""

    rank, size, description, capturable = 0, 2, "NCCL", True

    def __init__(self) -> None:
        self.asked: list[str] = []

    def _note(self, name: str, x: Tensor) -> Tensor:
        self.asked.append(name)
        return x

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._note("all_reduce", x)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._note("all_gather", x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return self._note("reduce_scatter", x)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self._note("broadcast", x)

    def barrier(self) -> None:
        self.asked.append("barrier")

    def wait(self, done: Any) -> None:
        while not done.query():
            time.sleep(0.001)

    def abort(self) -> None:
        self.asked.append("abort")


class RecordingArena:
    """Stands for PeerBuffers: notes what was asked of it, and for whom it waited in vain."""

    patience_s = 1.8

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lost: Late | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*_: Any, two_shot: bool = False, **__: Any) -> str:
            self.asked.append(name + (" two-shot" if two_shot else ""))
            return name

        return note

    def late(self) -> Late | None:
        return self.lost

    def fits_norm(self, columns: int, dtype: torch.dtype) -> bool:
        return columns < 4096


@pytest.fixture
def rank() -> tuple[SymmetricCommunicator, RecordingArena, Recorder]:
    nccl, arena = Recorder(), RecordingArena()
    comm = SymmetricCommunicator(nccl, arena, Policy(((1024, "one-shot"), (4096, "two-shot")), 2048), CPU)  # type: ignore[arg-type]
    return comm, arena, nccl


Rank = tuple[SymmetricCommunicator, RecordingArena, Recorder]


def test_size_and_dtype_choose_who_works(rank: Rank) -> None:
    comm, arena, nccl = rank

    def asked(call: Callable[[], Any]) -> str:
        arena.asked.clear()
        nccl.asked.clear()
        call()
        return ", ".join([*arena.asked, *(f"nccl {name}" for name in nccl.asked)])

    def bf16(n: int) -> Tensor:
        return torch.ones(n, dtype=torch.bfloat16)

    assert asked(lambda: comm.all_reduce(bf16(512))) == "all_reduce"
    assert asked(lambda: comm.all_reduce(bf16(513))) == "all_reduce two-shot"
    assert asked(lambda: comm.all_reduce(bf16(2049))) == "nccl all_reduce"
    assert asked(lambda: comm.all_reduce(bf16(0))) == "nccl all_reduce"
    assert asked(lambda: comm.all_reduce(torch.ones(4, dtype=torch.int64))) == "nccl all_reduce"
    assert asked(lambda: comm.all_gather(torch.ones(4, dtype=torch.int64))) == "all_gather"
    assert asked(lambda: comm.all_gather(bf16(1025))) == "nccl all_gather"
    assert asked(lambda: comm.reduce_scatter(bf16(2048).view(2, 1024))) == "reduce_scatter"
    assert asked(lambda: comm.reduce_scatter(bf16(4096).view(2, 2048))) == "nccl reduce_scatter"
    assert asked(lambda: comm.broadcast(bf16(1))) == "nccl broadcast"
    assert asked(lambda: comm.buffer(2, 256, torch.bfloat16)) == "buffer"
    assert asked(lambda: comm.buffer(2, 2048, torch.bfloat16)) == ""
    assert comm.buffer(0, 256, torch.bfloat16) is None


def test_the_norm_is_fused_where_a_row_fits(rank: Rank) -> None:
    comm, arena, nccl = rank

    def complete(rows: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        x, residual, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
        expected = residual.clone()
        norm = ops.add_rms_norm(x, expected, weight, 1e-5)
        found = comm.all_reduce_add_rms_norm(x, residual, weight, 1e-5)
        return found, norm, residual - expected

    complete(2, 64)
    complete(8, 64)
    assert arena.asked == ["all_reduce_add_rms_norm", "all_reduce_add_rms_norm two-shot"]
    found, norm, difference = complete(1, 4096)  # NCCL's stand-in returns x itself: the sum of one rank
    assert nccl.asked == ["all_reduce"]
    assert torch.equal(found, norm)
    assert not difference.any()


def test_a_rank_that_does_not_come_ends_the_group(rank: Rank) -> None:
    comm, arena, nccl = rank

    class Ready:
        def query(self) -> bool:
            return True

    comm.wait(Ready())
    comm.wait(Ready())
    arena.lost = Late([1, 3], "all_gather", 77)
    message = "rank 0 of 2: all_gather in step 3 has waited 1.8 s for rank 1, 3, which is gone or silent (round 77)"
    assert error_of(lambda: comm.wait(Ready())) == message
    assert "stop" in arena.asked
    assert "abort" in nccl.asked
    assert error_of(lambda: comm.all_reduce(torch.ones(4))) == message


def test_a_device_that_hangs_is_watched(rank: Rank) -> None:
    comm, arena, _ = rank

    class Never:
        def query(self) -> bool:
            arena.lost = Late([1], "all_reduce", 5)
            return False

    assert "for rank 1, which is gone or silent" in error_of(lambda: comm.wait(Never()))


def test_an_aborted_group_says_so(rank: Rank) -> None:
    comm, arena, _ = rank
    comm.abort()
    assert arena.asked == ["stop"]
    for call in (lambda: comm.all_reduce(torch.ones(4)), comm.barrier, lambda: comm.broadcast(torch.ones(1))):
        assert error_of(call) == "rank 0 of 2: the group has ended"


def test_nccl_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> PeerBuffers:
        raise NotShared("rank 1: NCCL_P2P_DISABLE is set")

    monkeypatch.setattr("lockstep.comm.symmetric.join", refuse)
    options: dict[str, Any] = {"store": HashStore(), "device": CPU, "shares_device": False, "timeout_s": 1.0}
    nccl = Recorder()
    assert share_memory(nccl, "auto", **options) is nccl  # type: ignore[arg-type]
    assert nccl.description == "NCCL; no shared memory: rank 1: NCCL_P2P_DISABLE is set"
    untouched = Recorder()
    assert share_memory(untouched, "nccl", **options) is untouched  # type: ignore[arg-type]
    assert untouched.description == "NCCL"


# --- products that write where they are told --------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_writes_where_it_is_told(with_bias: bool) -> None:
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
def test_a_place_that_does_not_fit_is_refused(out: Tensor, options: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must be \[3, 5\] torch.float32, contiguous, not gated, and alone"):
        ops.linear(torch.ones(3, 8), torch.ones(5, 8), out=out, **options)


def test_a_row_parallel_layer_writes_into_the_communicators_buffer() -> None:
    class Buffered(Recorder):
        def buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            self.place = torch.empty(rows, columns, dtype=dtype)
            return self.place

    torch.manual_seed(0)
    comm = Buffered()
    layer = RowLinear(Weights(torch.float32, CPU), comm, "o_proj", 6, 16, bias=False)
    layer.weight.normal_()
    x, residual = torch.randn(3, 8), Residual(torch.zeros(3, 6))
    layer(x, residual)
    assert residual.partial is comm.place
    assert torch.equal(comm.place, torch.nn.functional.linear(x, layer.weight))


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SIZES = (0, 1, 7, 8, 63, 4096, 4099, 65536 + 8, 1 << 20, (1 << 22) + 1, 1 << 24)  # elements; 64 MiB in float32
NORMS = [(1, 64), (1, 8192), (3, 1000), (40, 4096), (256, 5120), (5, 501)]


@pytest.fixture(params=[(2, 2), (4, 4), (2, 1), (4, 1), (4, 2)], ids="{0[0]}-on-{0[1]}".format)
def shared(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """(ranks, how to connect them): as processes on so many GPUs."""
    size, gpus = request.param
    return size, {**on_gpus(size, gpus), "all_reduce": "auto"}


def part(rank: int, *shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers of a rank, the same wherever they are made."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank + 31 * sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    """Their sum in float32 and in rank order, rounded once."""
    total = parts[0].float()
    for other in parts[1:]:
        total = total + other.float()
    return total.to(parts[0].dtype)


def reached(comm: Communicator) -> None:
    done = torch.cuda.Event()
    done.record()
    comm.wait(done)


def connected(comm: Communicator) -> SymmetricCommunicator:
    assert isinstance(comm, SymmetricCommunicator), comm.description
    return comm


def gpu_collectives(comm: Communicator) -> list[str]:
    """All collectives next to torch, bit for bit where they do not go to NCCL; the names of those that differ."""
    comm, wrong = connected(comm), []
    me, size = comm.rank, comm.size

    def expect(name: str, found: Tensor, expected: Tensor, exact: bool = True) -> None:
        tolerance = {} if exact else {"rtol": 2e-2, "atol": 6e-2}
        same = torch.equal(found, expected) if exact else torch.allclose(found, expected, **tolerance)
        if not same or found.shape != expected.shape:
            wrong.append(f"rank {me}: {name} {expected.dtype} {list(expected.shape)}")

    for dtype, numel in itertools.product(FLOATS, SIZES):
        every = [part(rank, numel, dtype=dtype) for rank in range(size)]
        small = comm._algorithm(numel * dtype.itemsize, dtype) != "nccl"
        total = in_order(every)
        expect("all_reduce", comm.all_reduce(every[me].clone()), total, small)
        buffer = comm.buffer(1, numel, dtype)
        assert (buffer is None) == (not small)
        if buffer is not None:
            expect("all_reduce of a buffer", comm.all_reduce(buffer.copy_(every[me])), total[None])
            odd = torch.empty(numel + 1, dtype=dtype, device="cuda")[me % 2 :][:numel].copy_(every[me])
            expect("all_reduce, misaligned on some", comm.all_reduce(odd), total)
            expect("all_gather, misaligned on some", comm.all_gather(odd), torch.stack(every))
        expect("all_gather", comm.all_gather(every[me]), torch.stack(every))
        rows = [part(rank, size, numel // size, dtype=dtype, seed=1) for rank in range(size)]
        exact = comm._algorithm(rows[me].nbytes, dtype) != "nccl"
        expect("reduce_scatter", comm.reduce_scatter(rows[me].clone()), in_order(rows)[me], exact)
    comm.barrier()
    comm.close()
    return wrong


def gpu_norms(comm: Communicator) -> tuple[list[str], list[Tensor]]:
    """The fused completion next to float32 in torch; what differs, and the results themselves."""
    comm = connected(comm)
    me, size, wrong, results = comm.rank, comm.size, [], []
    for dtype, (rows, columns), buffered in itertools.product(FLOATS, NORMS, (False, True)):
        every = [part(rank, rows, columns, dtype=dtype) for rank in range(size)]
        residual, weight = part(90, rows, columns, dtype=dtype), part(91, columns, dtype=dtype)
        total = residual.float() + sum(x.float() for x in every)
        x = comm.buffer(rows, columns, dtype) if buffered else torch.empty_like(residual)
        assert x is not None
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


def gpu_many(comm: Communicator) -> int:
    """10,000 all-reduces, a rank lagging now and then; how many were wrong."""
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
    """Graphs of 1 to 5 collectives, whose inputs are products in buffers, mixed with eager calls; the errors."""
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


def gpu_loses(comm: Communicator, when: str, how: str, in_graph: bool) -> tuple[list[str], float, float]:
    arena = connected(comm)._arena
    return lose_last_rank(comm, when, how, in_graph, lambda: arena.set_patience(1.5))


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["auto", "one-shot", "two-shot"])
def test_gpu_collectives_against_torch(algorithm: str, shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_collectives, timeout_s=60, **{**options, "all_reduce": algorithm}) == [[]] * size


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["one-shot", "two-shot"])
def test_gpu_norms_against_torch_with_the_same_bits_everywhere(
    algorithm: str, shared: tuple[int, dict[str, Any]]
) -> None:
    size, options = shared
    found = run_processes(size, gpu_norms, timeout_s=60, **{**options, "all_reduce": algorithm})
    assert [wrong for wrong, _ in found] == [[]] * size
    (_, first), *others = found
    for _, other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.gpu
def test_gpu_many_with_a_rank_that_lags(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_many, timeout_s=60, **options) == [0] * size


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["auto", "one-shot", "two-shot"])
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
