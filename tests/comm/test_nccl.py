"""NCCL through ctypes: layouts, arguments, errors, deadlines and ends over a stub library, then real ones on GPUs.

`GPU_TEST_LIBNCCL` is the path of a libnccl of 2.30 or newer. With NCCL_MULTI_RANK_GPU_ENABLE=1 and CUDA MPS, several
processes then share device 0.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.comm import connect as connecting
from lockstep.comm import nccl
from lockstep.comm import nccl_library as loading
from lockstep.comm.base import CommError, Communicator
from lockstep.comm.connect import connect
from lockstep.comm.nccl import NcclCommunicator
from lockstep.comm.nccl_library import CommConfig, Nccl, NcclError, UniqueId, open_library
from lockstep.comm.rendezvous import Rendezvous
from lockstep.runtime.config import Config
from lockstep.runtime.model.model_config import ModelConfig

from comm_failures import error_of, lose_last_rank
from rank_processes import PLACES, on_gpus, place_id, run_processes
from waiting import PATIENCE_S, wait_until

T = TypeVar("T")
Job = Callable[[NcclCommunicator], T]
STREAM = 0x7F00_1234_5678  # as wide as an address
SOURCE = Path(__file__).parents[1] / "support" / "nccl_stub.cpp"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
MOVED = [*DTYPES, torch.bool, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(0,), (1,), (7,), (3, 5), (4096,)]


class Reached:
    def query(self) -> bool:
        return True


class NeverReached:
    def query(self) -> bool:
        return False


class Stub:
    """A compiled stub: its library, its settings and its log."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.nccl = Nccl(self.path)
        self.nccl.lib.stub_log.restype = ctypes.c_char_p

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self.nccl.lib.stub_set(name.encode(), value)

    @property
    def log(self) -> list[str]:
        return [line.strip() for line in self.nccl.lib.stub_log().decode().splitlines()]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that compiles the stub with some macros, once for each set."""
    folder, built = tmp_path_factory.mktemp("nccl"), {}

    def compiled(*macros: str) -> Path:
        if macros not in built:
            built[macros] = folder / f"libnccl.so.{len(built)}"
            flags = ["-std=c++17", "-shared", "-fPIC", "-O0", *(f"-D{macro}" for macro in macros)]
            subprocess.run(["g++", *flags, "-o", built[macros], SOURCE], check=True, timeout=120)
        return built[macros]

    return compiled


@pytest.fixture
def stub(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """The stub, with host memory in place of a GPU; fails if a communicator is used after its end."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nccl, "record_event", lambda device: Reached())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    found = Stub(build())
    found.nccl.lib.stub_reset()
    yield found
    assert not [line for line in found.log if "misuse" in line or "too early" in line]
    found.nccl.lib.stub_reset()


def run(stub: Stub, job: Job[T], size: int = 2, timeout_s: float = 20.0) -> list[T]:
    """Return `job(communicator)` of `size` ranks, each a thread; raises the error of the lowest failing rank."""
    store = HashStore()

    def rank(number: int) -> T:
        rendezvous = Rendezvous(store, number, size, timeout_s)
        return job(NcclCommunicator(rendezvous, nccl=stub.nccl, device=torch.device("cpu")))

    with ThreadPoolExecutor(size) as threads:
        return [future.result(60) for future in [threads.submit(rank, number) for number in range(size)]]


def small(rank: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Return integers from 0 to 7, whose sums are exact in every dtype and in any order."""
    return torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(rank + 31 * sum(shape))).to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Compare bit by bit, because fp8 has no comparison."""
    return found.shape == expected.shape and torch.equal(
        found.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def collectives(comm: Communicator, device: str = "cpu", shapes: list[tuple[int, ...]] = SHAPES) -> list[str]:
    """Run all collectives in place and out of place; returns the names of those that differ from torch."""
    assert isinstance(comm, NcclCommunicator)
    me, size, wrong = comm.rank, comm.size, []

    def expect(name: str, found: Tensor, expected: Tensor) -> None:
        if not same(found, expected):
            wrong.append(f"rank {me}: {name} {expected.dtype} {list(expected.shape)}")

    for shape in shapes:
        for dtype in MOVED:
            every = torch.stack([small(rank, *shape, dtype=dtype) for rank in range(size)])
            mine, gathered = every[me].to(device), torch.zeros_like(every, device=device)
            expect("all_gather", comm.all_gather(mine), every)
            gathered[me].copy_(mine)
            expect("all_gather in place", comm.all_gather(gathered[me], gathered), every)
        for dtype in DTYPES:
            every = torch.stack([small(rank, *shape, dtype=dtype) for rank in range(size)])
            total, mine = every.sum(0).to(dtype), every[me].to(device)
            out = torch.zeros_like(mine)
            expect("all_reduce out of place", comm.all_reduce(mine, out), total)
            expect("what was reduced out of place", mine, every[me])
            expect("all_reduce", comm.all_reduce(mine), total)
    comm.barrier()
    return wrong


# --- numbers of the header ------------------------------------------------------------------------------------------


def test_layouts_are_those_of_the_header() -> None:
    """Offsets as g++ gives them for ncclConfig_t of nccl.h 2.28.9; the first 80 of 120 bytes in 2.32.3."""
    offsets = {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cga_cluster_size": 20,
        "min_ctas": 24,
        "max_ctas": 28,
        "net_name": 32,
        "split_share": 40,
        "traffic_class": 44,
        "comm_name": 48,
        "collnet_enable": 56,
        "cta_policy": 60,
        "shrink_share": 64,
        "nvls_ctas": 68,
        "channels_per_net_peer": 72,
        "nvlink_centric_sched": 76,
    }
    assert {field[0]: getattr(CommConfig, field[0]).offset for field in CommConfig._fields_} == offsets
    assert (ctypes.sizeof(CommConfig), ctypes.sizeof(UniqueId)) == (80, 128)


def test_codes_are_those_of_the_header() -> None:
    """ncclDataType_t of nccl.h 2.32.3."""
    names = "int8 uint8 int32 uint32 int64 uint64 float16 float32 float64 bfloat16 float8_e4m3fn float8_e5m2"
    assert {str(dtype): code for dtype, code in loading.REDUCTION_TYPES.items()} == {
        f"torch.{name}": code for code, name in enumerate(names.split())
    }


def test_installed_library_has_the_functions() -> None:
    path = os.environ.get("GPU_TEST_LIBNCCL") or next(iter(loading.mapped_libraries()), None)
    if path is None:
        pytest.skip("torch has mapped no libnccl here, and GPU_TEST_LIBNCCL is not set")
    nccl = Nccl(path)
    nccl.require(*(name for name in loading.OPTIONAL if loading.SINCE.get(name, loading.OLDEST) <= nccl.version))
    assert len(nccl.unique_id()) == 128  # works without a GPU, and by value and pointer as declared
    with pytest.raises(NcclError, match=r"^invalid handle failed: invalid argument"):
        nccl.check(4, "invalid handle")


def test_fp8_is_added_if_the_library_can(stub: Stub) -> None:
    assert stub.nccl.reduction_type(torch.float8_e5m2) == 11
    stub.nccl.version = 22304
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ValueError, match=rf"^NCCL 2.23.4 cannot add {dtype}; .* fp8 since 2.24.0$"):
            stub.nccl.reduction_type(dtype)
    assert stub.nccl.reduction_type(torch.int8) == 0


# --- one library in a process ---------------------------------------------------------------------------------------


def test_library_without_required_functions_is_refused_by_name(build: Callable[..., Path]) -> None:
    with pytest.raises(NcclError, match=r"lacks ncclCommFinalize; use a libnccl of 2.18 or newer$"):
        Nccl(str(build("LACKS_FINALIZE")))
    old = Nccl(str(build("LACKS_WINDOWS", "VERSION=22605")))
    with pytest.raises(NcclError, match=r" lacks ncclSend; use 2.18.0 or newer$"):  # the stub has no ncclSend
        old.require("ncclSend")
    old.require("ncclMemAlloc")
    with pytest.raises(NcclError, match=r"^NCCL 2.26.5 at .* lacks ncclCommWindowRegister; use 2.27.0 or newer$"):
        old.require("ncclMemAlloc", "ncclCommWindowRegister")


def test_missing_library_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_opened", {})
    with pytest.raises(NcclError, match=r"cannot be loaded: /nowhere/libnccl.so.2: .*nccl_library"):
        open_library("/nowhere/libnccl.so.2")


def test_process_uses_one_library(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "_opened", {})
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    first, other = build(), build("VERSION=22809")
    opened = open_library(str(first))
    link = tmp_path / "libnccl.so.2"
    link.symlink_to(first)
    assert open_library(str(link)) is open_library(None) is opened
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert str(first) in loading.mapped_libraries()
    with pytest.raises(NcclError, match=rf"uses {first} already; {other} needs another process"):
        open_library(str(other))


def test_nvls_enable_of_the_user_is_kept(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_opened", {})
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    open_library(str(build()))
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"


def test_library_of_torch_is_the_default_and_no_other_calls_into_it(build: Callable[..., Path]) -> None:
    """In another process, one stub takes the place of torch's libnccl, in the global scope."""
    torchs, named = build("VERSION=22809"), build()
    code = f"""
import ctypes
ctypes.CDLL({str(torchs)!r}, mode=ctypes.RTLD_GLOBAL)
from lockstep.comm.nccl_library import Nccl, open_library
print(open_library(None), open_library(None).path == {str(torchs)!r}, Nccl({str(named)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "NCCL 2.28.9 True NCCL 2.32.3", done.stderr


# --- collectives over the stub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_against_torch(stub: Stub, size: int) -> None:
    assert run(stub, collectives, size) == [[]] * size


def test_arguments_of_nccl(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> None:
        comm.all_reduce(torch.ones(3, 5, dtype=torch.bfloat16))
        comm.all_gather(torch.ones(6, dtype=torch.int16))
        comm.close()

    run(stub, job)
    assert [line for line in stub.log if line.split()[1] == "1"] == [
        "init 1 2 80 1 22800 0 1 1 -2147483648",  # size, magic, version, non-blocking, the rest unset
        f"all_reduce 1 1 7 0 {STREAM}",  # the barrier at the start: float32
        f"all_reduce 1 15 9 0 {STREAM}",  # bfloat16, sum
        f"all_gather 1 12 1 {STREAM}",  # bytes
        "finalize 1",
        "destroy 1",
    ]


def test_empty_tensors_are_not_sent(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> list[Tensor]:
        empty = torch.empty(0, 4)
        return [comm.all_reduce(empty), comm.all_gather(empty)]

    assert [list(x.shape) for x in run(stub, job)[0]] == [[0, 4], [2, 0, 4]]
    assert len([line for line in stub.log if not line.startswith("init")]) == 2  # the barrier at the start


REFUSED: dict[str, Callable[[NcclCommunicator], Any]] = {
    r"^all_reduce: x \[5, 3\] with strides \[1, 5\] must be contiguous": lambda c: c.all_reduce(torch.ones(3, 5).t()),
    r"^all_gather: x .* must be contiguous": lambda c: c.all_gather(torch.ones(8)[::2]),
    r"^all_reduce: x is on meta; this group's tensors are on cpu": lambda c: c.all_reduce(torch.ones(3, device="meta")),
    r"^all_reduce: out \[4\] torch.float32 must be \[3\] torch.float32": lambda c: c.all_reduce(
        torch.ones(3), torch.ones(4)
    ),
    r"^all_gather: out \[3\] .* must be \[2, 3\]": lambda c: c.all_gather(torch.ones(3), torch.ones(3)),
    r"^all_reduce: out \[4\] torch.int64 must be \[4\] torch.float32": lambda c: c.all_reduce(
        torch.ones(4), torch.ones(4, dtype=torch.int64)
    ),
    r"^NCCL 2.32.3 cannot add torch.bool": lambda c: c.all_reduce(torch.ones(3, dtype=torch.bool)),
}


def test_unfit_tensors_are_refused_by_name(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> None:
        for message, call in REFUSED.items():
            with pytest.raises(ValueError, match=message):
                call(comm)

    run(stub, job)


# --- failures and ends ----------------------------------------------------------------------------------------------


def test_error_has_the_text_of_nccl_and_ends_the_group(stub: Stub) -> None:
    here = threading.Barrier(2)

    def job(comm: NcclCommunicator) -> list[str]:
        here.wait()
        if comm.rank == 1:
            return []
        stub.set(fail=2)
        return [error_of(lambda: comm.all_reduce(torch.ones(3))), error_of(comm.barrier), error_of(comm.close)]

    failed, later, closed = run(stub, job)[0]
    assert failed == "rank 0 of 2: all_reduce failed: unhandled system error (socket closed by its peer)"
    assert later == "rank 0 of 2: all_reduce failed: the group has ended"
    assert closed == "no error"
    assert stub.log.count("abort 0") == 1


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NcclError("rank 0 of 2: all_reduce failed")))
    assert isinstance(error, CommError)
    assert str(error) == "rank 0 of 2: all_reduce failed"


def test_asynchronous_error_ends_the_wait(stub: Stub) -> None:
    here = threading.Barrier(2)

    def job(comm: NcclCommunicator) -> str:
        comm.check()
        here.wait()
        if comm.rank == 1:
            return ""
        stub.set(async_error=6)
        return error_of(lambda: comm.wait(NeverReached()))

    found = run(stub, job)[0]
    assert found == "rank 0 of 2: barrier failed: remote process exited (socket closed by its peer)"
    assert "abort 0" in stub.log


def test_collective_with_a_silent_peer_ends_at_its_deadline(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> tuple[str, float]:
        comm._timeout_s, started = 1.0, time.monotonic()
        return error_of(lambda: comm.all_reduce(torch.ones(3))) if comm.rank == 0 else "", time.monotonic() - started

    (message, seconds), _ = run(stub, job)
    assert message == "rank 0 of 2: all_reduce took longer than 1 s: a peer is gone or silent"
    assert seconds >= 1
    assert "abort 0" in stub.log


def test_device_wait_for_a_dead_peer_ends_at_the_deadline(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> list[str]:
        comm.all_gather(torch.ones(3))
        comm.wait(Reached())
        comm._timeout_s = 1.0
        return [error_of(lambda: comm.wait(NeverReached())), error_of(lambda: comm.all_reduce(torch.ones(3)))]

    for rank, found in enumerate(run(stub, job)):
        assert found[0] == f"rank {rank} of 2: all_gather took longer than 1 s: a peer is gone or silent"
        assert found[1] == f"rank {rank} of 2: all_reduce failed: the group has ended"


def test_device_wait_in_a_graph_is_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(comm: NcclCommunicator) -> str:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        comm.all_reduce(torch.ones(3))
        here.wait()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        here.wait()
        comm.barrier()
        comm._timeout_s = 1.0
        return error_of(lambda: comm.wait(NeverReached()))

    here = threading.Barrier(2)
    what = "barrier or all_reduce of a graph took longer than 1 s: a peer is gone or silent"
    assert run(stub, job) == [f"rank {rank} of 2: {what}" for rank in range(2)]


def test_abort_from_another_thread_ends_a_collective(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> tuple[str, float]:
        if comm.rank == 1:
            return "", 0
        threading.Timer(0.3, comm.abort).start()
        started = time.monotonic()
        return error_of(lambda: comm.all_reduce(torch.ones(3))), time.monotonic() - started

    (message, seconds), _ = run(stub, job, timeout_s=2 * PATIENCE_S)
    assert message == "rank 0 of 2: all_reduce failed: the group has ended"
    assert seconds < PATIENCE_S, "long before the deadline"
    wait_until(lambda: "abort 0" in stub.log)  # the thread that aborts may be a moment behind
    assert stub.log.count("abort 0") == 1


def test_results_after_an_abort_are_invalid(stub: Stub) -> None:
    class ReachedByAbort:
        def query(self) -> bool:
            return "abort 0" in stub.log

    def job(comm: NcclCommunicator) -> str:
        if comm.rank == 1:
            return ""
        threading.Timer(0.05, comm.abort).start()
        return error_of(lambda: comm.wait(ReachedByAbort()))

    assert run(stub, job)[0] == "rank 0 of 2: barrier failed: the group has ended"


def test_close_finalizes_before_it_destroys_and_may_come_twice(stub: Stub) -> None:
    def job(comm: NcclCommunicator) -> None:
        comm.close()
        comm.close()
        comm.abort()

    run(stub, job)
    for rank in range(2):
        assert [line for line in stub.log if line.split()[1] == str(rank)][2:] == [
            f"finalize {rank}",
            f"destroy {rank}",
        ]


def test_close_keeps_its_deadline(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl, "CLOSE_S", 0.2)

    here = threading.Barrier(2)

    def job(comm: NcclCommunicator) -> None:
        here.wait()
        if comm.rank == 0:
            stub.set(hang=1)
            comm.close()

    run(stub, job)
    assert "rank 0 of 2: closing took longer than 0 s" in caplog.text
    assert [line for line in stub.log if line.endswith(" 0")][-2:] == ["finalize 0", "abort 0"]


def test_joining_keeps_its_deadline(stub: Stub) -> None:
    stub.set(hang=1)
    with pytest.raises(NcclError, match=r"^rank 0 of 2: joining took longer than 2 s: all ranks have come, but NCCL"):
        run(stub, lambda comm: None, timeout_s=2.0)
    assert {"abort 0", "abort 1"} <= set(stub.log)


def test_joining_fails_with_the_text_of_nccl(stub: Stub) -> None:
    stub.set(fail=2)
    with pytest.raises(NcclError, match=r"^rank 0 of 2: joining failed: unhandled system error \(socket closed"):
        run(stub, lambda comm: None)


def test_silent_ranks_are_named() -> None:
    store = HashStore()
    store.set("choice/2", "NCCL 2.32.3")
    with pytest.raises(CommError, match=r"^rank 1 of 4: no message within 1 s from rank 0, 3$"):
        Rendezvous(store, 1, 4, 1.0).exchange("choice", "NCCL 2.32.3")


# --- the choice -----------------------------------------------------------------------------------------------------


def connect_all(
    monkeypatch: pytest.MonkeyPatch, stub: Stub, versions: list[int], *, shares_device: bool
) -> list[Communicator | CommError]:
    """Return the result or error of `connect` on each rank, with a library of the given version."""
    libraries = []
    for version in versions:
        nccl = Nccl(stub.path)
        nccl.version = version
        libraries.append(nccl)
    monkeypatch.setattr(connecting, "open_library", lambda path: libraries[int(path)])
    store = HashStore()

    def rank(number: int) -> Communicator | CommError:
        try:
            return connect(
                number,
                len(versions),
                store=store,
                own_ip="127.0.0.1",
                device=torch.device("cuda"),
                shares_device=shares_device,
                library=str(number),
                timeout_s=20,
            )
        except CommError as error:
            return error

    with ThreadPoolExecutor(len(versions)) as threads:
        return list(threads.map(rank, range(len(versions))))


def test_unequal_versions_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> None:
    for found in connect_all(monkeypatch, stub, [22809, 23203, 22809], shares_device=False):
        assert isinstance(found, NcclError)
        assert "rank 0 has NCCL 2.28.9, rank 1 has NCCL 2.32.3, rank 2 has NCCL 2.28.9" in str(found)


@pytest.mark.parametrize(
    ("version", "enabled", "why"),
    [
        (22809, "1", "the ranks share a GPU, which needs NCCL 2.30.0 and this is NCCL 2.28.9"),
        (23203, "0", "the ranks share a GPU, which NCCL 2.32.3 allows with NCCL_MULTI_RANK_GPU_ENABLE=1 only"),
    ],
)
def test_ranks_that_share_a_gpu_fall_back_to_gloo_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, stub: Stub, version: int, enabled: str, why: str
) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", enabled)
    for found in connect_all(monkeypatch, stub, [version] * 2, shares_device=True):
        assert isinstance(found, Communicator)
        assert found.description == f"gloo through torch, 2 ranks: {why}"
        assert not found.capturable


def test_ranks_that_share_a_gpu_use_nccl_if_it_can(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> None:
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))  # there is no GPU here
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    for found in connect_all(monkeypatch, stub, [23203] * 2, shares_device=True):
        assert isinstance(found, NcclCommunicator)
        assert found.description == f"NCCL 2.32.3, 2 ranks, {stub.path}"
        assert found.capturable
    limits = [line.split()[-1] for line in stub.log if line.startswith("init")]
    assert limits == ["33"] * 2  # two ranks leave half of the GPU free


def test_nccl_library_option_is_a_path_for_gpus() -> None:
    with pytest.raises(ValueError, match=r"^nccl_library='lib/libnccl.so.2' must be an absolute path"):
        Config(nccl_library="lib/libnccl.so.2")
    config = Config(nccl_library="/opt/libnccl.so.2")
    model = ModelConfig.from_folder(Path(config.model))
    assert config.resolved(model, cuda=True).nccl_library == "/opt/libnccl.so.2"
    with pytest.raises(ValueError, match=r"^nccl_library is for ranks on GPUs"):
        config.resolved(model, cuda=False)


# --- real libraries -------------------------------------------------------------------------------------------------

GPU_SHAPES: list[tuple[int, ...]] = [(0,), (1,), (7,), (4096,), (1 << 20,)]


@pytest.fixture(params=PLACES, ids=place_id)
def shared(request: pytest.FixtureRequest) -> tuple[int, dict[str, Any]]:
    """The number of ranks, which are processes on one or more GPUs, and the options of `connect`."""
    size, gpus = request.param
    return size, on_gpus(size, gpus)


def gpu_collectives(comm: Communicator) -> list[str]:
    assert isinstance(comm, NcclCommunicator), comm.description
    wrong = collectives(comm, "cuda", GPU_SHAPES)
    comm.close()
    return wrong


def gpu_sums(comm: Communicator) -> list[Tensor]:
    """Return sums of random floats, whose bits depend on the order of addition."""
    torch.manual_seed(comm.rank)
    parts = [torch.randn(n).to(dtype) for n in (1, 7, 4096, 1 << 20) for dtype in (torch.float32, torch.bfloat16)]
    found = [comm.all_reduce(part.cuda()).cpu() for part in parts]
    comm.close()
    return found


def gpu_replay(comm: Communicator) -> bool:
    """Replay a graph with every collective on changing data; returns whether all results are right."""
    size = comm.size
    x = torch.zeros(4096, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        return comm.all_reduce(x.clone()), comm.all_gather(x)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        summed, gathered = step()
    ok = True
    for turn in range(3):
        x.fill_(turn + comm.rank)
        graph.replay()
        done = torch.cuda.Event()
        done.record()
        comm.wait(done)  # type: ignore[attr-defined]
        ok &= bool((summed == size * turn + sum(range(size))).all())
        ok &= bool((gathered == torch.arange(size, device="cuda")[:, None] + turn).all())
    del graph  # NCCL's end waits for it
    comm.close()
    return ok


def gpu_loses(comm: Communicator, when: str, how: str, in_graph: bool) -> tuple[list[str], float, float]:
    assert isinstance(comm, NcclCommunicator)
    return lose_last_rank(comm, when, how, in_graph)


@pytest.mark.gpu
def test_gpu_collectives_against_torch(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_collectives, timeout_s=60, **options) == [[]] * size


@pytest.mark.gpu
def test_gpu_sums_are_bitwise_identical_on_all_ranks(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    first, *others = run_processes(size, gpu_sums, timeout_s=60, **options)
    for other in others:
        assert all(same(x, y) for x, y in zip(first, other, strict=True))
    parts = []
    for rank in range(size):
        torch.manual_seed(rank)
        parts.append([torch.randn(n).to(d) for n in (1, 7, 4096, 1 << 20) for d in (torch.float32, torch.bfloat16)])
    for found, *terms in zip(first, *parts, strict=True):
        exact, bound = sum(t.double() for t in terms), sum(t.double().abs() for t in terms)
        # Each of the size - 1 additions rounds a partial sum, which is at most `bound`, by half a unit.
        assert ((found.double() - exact).abs() <= (size - 1) * torch.finfo(found.dtype).eps * bound).all()


@pytest.mark.gpu
def test_gpu_collectives_in_a_graph(shared: tuple[int, dict[str, Any]]) -> None:
    size, options = shared
    assert run_processes(size, gpu_replay, timeout_s=60, **options) == [True] * size


@pytest.mark.gpu
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_gpu_survivors_of_a_lost_rank_raise(
    when: str, how: str, in_graph: bool, shared: tuple[int, dict[str, Any]]
) -> None:
    size, options = shared
    job = partial(gpu_loses, when=when, how=how, in_graph=in_graph)
    *survivors, lost = run_processes(size, job, timeout_s=60, **options)
    assert lost is None
    for rank, ((told, later), told_s, busy_s) in enumerate(survivors):
        where = "barrier or all_reduce of a graph" if in_graph else "all_reduce"
        assert told.startswith(f"rank {rank} of {size}: {where} "), told
        assert later == f"rank {rank} of {size}: all_reduce failed: the group has ended"
        assert told_s < 5
        assert busy_s < 6
