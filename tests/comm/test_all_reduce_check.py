"""The check of all-reduce kernels at start-up: an algorithm with wrong sums is excluded, or refused, on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from lockstep.comm import connect as connecting
from lockstep.comm.all_reduce_check import RowShape, wrong_algorithms
from lockstep.comm.all_reduce_names import ALL_REDUCE_ALGORITHMS, AllReduceAlgorithm, AllReduceChoice
from lockstep.comm.all_reduce_policy import SIZES, AllReducePolicy, AllReduceTimings
from lockstep.comm.base import CommError, Communicator
from lockstep.comm.connect import with_peer_memory
from lockstep.comm.rendezvous import Rendezvous

from ranks import run_ranks

SIZE = 3
SHAPE = RowShape(1024, torch.bfloat16, torch.device("cpu"))
STEPS: tuple[tuple[int, AllReduceAlgorithm], ...] = ((32 << 10, "push"), (256 << 10, "one-shot"), (2 << 20, "two-shot"))
Fault = Callable[[Tensor], None]


class SumsByPolicy(Communicator):
    """A rank that sums over another communicator, with a fault in the results of some algorithms."""

    description, capturable = "peer memory", False

    def __init__(self, peers: Communicator, policy: AllReducePolicy, faults: dict[AllReduceAlgorithm, Fault]) -> None:
        self.peers, self.policy, self.faults = peers, policy, faults
        self.rank, self.size = peers.rank, peers.size

    def with_policy(self, policy: AllReducePolicy) -> SumsByPolicy:
        return SumsByPolicy(self.peers, policy, self.faults)

    def compile_sums(self, columns: int, dtype: torch.dtype) -> None:
        return

    def gemms_push(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        return self.policy.lets_gemms_push(rows, columns, dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        algorithm = self.policy.algorithm(x.nbytes, x.dtype)
        total = self.peers.all_reduce(x)
        self.faults.get(algorithm, lambda _: None)(total)
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        return self.peers.all_gather(x)

    def barrier(self) -> None:
        self.peers.barrier()


def add_one_to_last(total: Tensor) -> None:
    total[-1, -1] += 1


def swap_rows(total: Tensor) -> None:
    total[[0, -1]] = total[[-1, 0]]


def be_stale(total: Tensor, earlier: list[Tensor]) -> None:
    """Return the previous sum instead, as a read that comes too soon does."""
    mine = total.clone()
    if earlier and earlier[0].shape == total.shape:
        total.copy_(earlier[0])
    earlier[:] = [mine]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lockstep.comm.all_reduce_check.SIZES", [size for size in SIZES if size <= 512 << 10])


def wrong(
    faults: dict[int, dict[AllReduceAlgorithm, Fault]], gemm_bytes: int = 0
) -> list[dict[AllReduceAlgorithm, str]]:
    """Return what each rank finds when some ranks have faults."""
    store, policy = HashStore(), AllReducePolicy(STEPS, gemm_bytes=gemm_bytes)

    def check(comm: Communicator) -> dict[AllReduceAlgorithm, str]:
        sums = SumsByPolicy(comm, policy, faults.get(comm.rank, {}))
        return wrong_algorithms(sums, comm, policy, Rendezvous(store, comm.rank, comm.size, 20.0), SHAPE)

    return run_ranks(SIZE, check, in_turns=False)  # they wait at the rendezvous, too


def test_right_sums_are_accepted() -> None:
    assert wrong({}) == [{}] * SIZE


def test_all_ranks_know_the_fault_of_one() -> None:
    found = wrong({1: {"one-shot": add_one_to_last}})
    assert [set(faults) for faults in found] == [{"one-shot"}] * SIZE
    assert found[0]["one-shot"].startswith("rank 1: ")
    assert found[0]["one-shot"].endswith(" wrong elements at 64 KiB"), "the smallest size of one-shot"


def test_misplaced_and_stale_sums_are_noticed() -> None:
    assert set(wrong({2: {"push": swap_rows}})[0]) == {"push"}
    earlier: list[Tensor] = []
    assert set(wrong({0: {"two-shot": lambda total: be_stale(total, earlier)}})[0]) == {"two-shot"}


def test_wrong_sums_of_gemms_are_those_of_push(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(self: SumsByPolicy, *arguments: Any, **options: Any) -> Tensor:
        product = Communicator.linear(self, *arguments, **options)
        assert product.shape[1] == SHAPE.columns
        product[-1, -1] += self.rank == 1
        return product

    assert wrong({}, 16 << 10) == [{}] * SIZE
    monkeypatch.setattr(SumsByPolicy, "linear", linear)
    faults = wrong({}, 16 << 10)
    assert [set(found) for found in faults] == [{"push"}] * SIZE
    assert faults[0]["push"].endswith(" wrong elements at 2 KiB of GEMMs"), "one row"


def test_sums_of_linear_are_not_checked_where_gemms_do_not_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy may let GEMMs push rows that the communicator cannot: push is not to blame for their sums."""
    monkeypatch.setattr(SumsByPolicy, "gemms_push", Communicator.gemms_push)
    monkeypatch.setattr(SumsByPolicy, "linear", lambda *_: pytest.fail("not pushed"))
    assert wrong({}, 16 << 10) == [{}] * SIZE


def test_silent_rank_is_named_with_the_algorithm() -> None:
    def fail(total: Tensor) -> None:
        raise CommError("rank 0 of 3: all_reduce has waited 1.8 s for rank 2")

    with pytest.raises(CommError, match=r"^checking all-reduce push with 8 KiB: .* for rank 2; --all-reduce nccl"):
        wrong({rank: {"push": fail} for rank in range(SIZE)})


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Return what `with_peer_memory` returns or raises on each rank, when an algorithm has a fault on rank 1."""
    times = {name: [1.0 + (name != fastest) for fastest in fastest_of()] for name in ALL_REDUCE_ALGORITHMS}
    monkeypatch.setattr(connecting, "autotune_all_reduce", lambda *_: AllReduceTimings(SIZES, times))
    gpu = SimpleNamespace(name="GPU", uuid="0")
    monkeypatch.setattr(connecting.torch.cuda, "get_device_properties", lambda _: gpu)

    def run(
        all_reduce: AllReduceChoice, faults: dict[AllReduceAlgorithm, Fault], batch_invariant: bool = False
    ) -> list[Any]:
        store = HashStore()
        monkeypatch.setattr(
            connecting, "map_peer_buffers",
            lambda nccl, *_, **__: SumsByPolicy(nccl, AllReducePolicy(()), faults if nccl.rank == 1 else {}),
        )  # fmt: skip

        def join(comm: Communicator) -> Any:
            rendezvous: Any = Rendezvous(store, comm.rank, comm.size, 20.0)
            options: dict[str, Any] = {"batch_invariant": batch_invariant, "shape": SHAPE, "shares_device": False}
            try:
                return with_peer_memory(comm, all_reduce, rendezvous, **options)  # type: ignore[arg-type]
            except CommError as error:
                return str(error)

        return run_ranks(SIZE, join, in_turns=False)

    return run


def fastest_of() -> list[AllReduceAlgorithm]:
    """Return the algorithm that is the fastest at each of SIZES."""
    return [next((name for largest, name in STEPS if size <= largest), "nccl") for size in SIZES]


def test_auto_tuning_excludes_wrong_algorithms_on_all_ranks(
    connect: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        comms = connect("auto", {"push": add_one_to_last, "two-shot": swap_rows})
    assert [comm.policy for comm in comms] == [comms[0].policy] * SIZE
    assert {name for _, name in comms[0].policy.steps} <= {"nccl", "one-shot"}
    lines = [record.message for record in caplog.records]
    for name in ("push", "two-shot"):
        said = f"all-reduce {name} computes other sums than NCCL on these GPUs (rank 1: "
        assert sum(line.startswith(said) and line.endswith("; it is not used") for line in lines) == SIZE
        assert all(said in comm.description for comm in comms)
    assert len(lines) == 2 * SIZE


def test_auto_tuning_without_a_fault_says_nothing(
    connect: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    (comm, *_) = connect("auto", {})
    assert comm.policy.steps == STEPS
    assert not caplog.records
    assert "other sums" not in comm.description


def test_chosen_algorithm_with_wrong_sums_is_refused(connect: Callable[..., list[Any]]) -> None:
    for error in connect("push", {"push": add_one_to_last}):
        assert error.startswith("all-reduce push computes other sums than NCCL on these GPUs (rank 1: ")
        assert error.endswith("; choose another one with --all-reduce")
    assert connect("push", {"two-shot": add_one_to_last})[0].policy == AllReducePolicy.only("push")
    for error in connect("auto", {"two-shot": add_one_to_last}, batch_invariant=True):
        assert error.startswith("all-reduce two-shot computes other sums")
