"""The collectives of several ranks against sums in rank order, on a CPU, without a GPU (peer_emulator.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lockstep.kernels.arguments import FP8Weight, Matrix
from lockstep.kernels.native import source_text

import emulator
from peer_emulator import PeerEmulator
from peer_group import EPS, FUSED, PLAIN, PeerGroup, queue_all

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]
BUFFER_BYTES = 8192


def emulated(size: int, seed: int = 0, in_graph: bool = True, **options: Any) -> PeerGroup:
    return PeerGroup(PeerEmulator(size, buffer_bytes=BUFFER_BYTES, **options), seed, in_graph)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize("in_graph", [True, pytest.param(False, marks=NIGHTLY)])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (2, torch.bfloat16),
        pytest.param(3, torch.float32, marks=NIGHTLY),
        pytest.param(4, torch.float16, marks=NIGHTLY),
        (8, torch.bfloat16),
    ],
)
def test_collectives_of_ranks_that_are_slow_in_turn(size: int, dtype: torch.dtype, in_graph: bool) -> None:
    group = emulated(size, in_graph=in_graph)
    queue_all(group, 0, dtype)
    group.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_that_are_compiled_ahead_are_those_of_the_sums(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, names = emulated(2), list[str]()
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(group.kernels, "kernel", lambda source, name, early: names.append(name))
    group.kernels.compile_sums(512, dtype, group.peers.tables[0])
    monkeypatch.setattr(group.kernels, "kernel", group.peers._kernel)
    for operation in (*PLAIN[:3], *FUSED):
        for rows in (1, 2, 3, 8):
            group.queue(operation, rows, 512, dtype)
            x, weight = group.random(rows, 512, dtype), group.random(1, 512, dtype)[0]
            group.kernels.receive_add_rms_norm(x, x, weight, EPS, group.peers.tables[0])
    assert {name for _, name, *_ in group.peers._launches} <= set(names)


LAYOUTS = {
    "one-shot": [("one-shot", 128, 8), ("push", 64, 3), ("push", 32, 1)],
    "two-shot": [("two-shot", 128, 8), ("two-push", 64, 1), ("two-push", 32, 1), ("two-push", 128, 8)],
}


@NIGHTLY
@pytest.mark.parametrize("pull", LAYOUTS)
def test_pushes_have_the_bits_of_pulls_in_any_layout(pull: str) -> None:
    results = []
    for operation, threads, blocks in ((pull, 64, 1), *LAYOUTS[pull]):
        group = emulated(2, threads=threads, blocks=blocks)
        group.queue(f"{operation} fused", 3, 512)
        results.append([result for _, result, *_ in group.expectations])
        group.check()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_of_an_empty_inbox_can_be_sent(dtype: torch.dtype) -> None:
    group = emulated(2)
    empty = torch.full((2, 64 * dtype.itemsize), 0xFF, dtype=torch.uint8).view(dtype)
    results = []
    for rank in range(2):
        x, residual = (empty if rank else torch.zeros_like(empty)).clone(), torch.zeros_like(empty)
        with group.peers.on_rank(rank) as table:
            group.kernels.two_push_add_rms_norm(torch.empty_like(x), x, residual, torch.ones_like(x[0]), EPS, table)
        results.append(residual)
    group.check()
    assert all(result.isnan().all() for result in results)


MUTATIONS: dict[str, tuple[str, str]] = {
    "a signal without a fence": ("store_release(signal, round)", "*signal = round"),
    "no barrier before a signal": ("__syncthreads();\n        ++round;", "++round;"),
    "one mailbox": ("const int turn = round % 2 * N;", "const int turn = 0;"),
    "half of the flags": ("half.x >> 32 == round && half.y >> 32 == round", "half.x >> 32 == round"),
    "no wait for signals": (">= 0; });", ">= -1; });"),
    "one pair of inboxes": ("round % 2 * 2 * bytes", "0 * bytes"),
    "half of a vector": (" || (unsigned)words[k].y == EMPTY", ""),
    "inboxes that stay full": ("if (sender(k) >= 0) store(const_cast<T*>(place(k)),", "static_cast<void>("),
    "no barrier after buffer 0": ("if (slot == 0) arrive_and_wait();", ""),
}


@NIGHTLY
@pytest.mark.parametrize("name", MUTATIONS)
def test_errors_in_the_kernels_are_seen(name: str) -> None:
    before, after = MUTATIONS[name]
    assert source_text("peer_collectives.cu").count(before) == 1

    def mutate(source: str) -> str:
        return source.replace(before, after)

    def some_attempt_fails() -> None:
        for seed in range(4):
            group = emulated(2, seed, in_graph=seed % 2 == 0, mutate=mutate)
            queue_all(group, seed)
            for _ in range(3):
                group.queue("two-push fused", 3, 64)
            group.check()

    with pytest.raises(AssertionError):
        some_attempt_fails()


@pytest.mark.parametrize("operation", ["push", *(pytest.param(name, marks=NIGHTLY) for name in (*PLAIN[1:], *FUSED))])
def test_missing_rank_is_named(operation: str) -> None:
    group = emulated(3, timeout_ns=100_000)
    parts = [group.random(2, 96, torch.float32) for _ in range(3)]
    for rank in (0, 2):
        with group.peers.on_rank(rank) as table:
            for _ in range(2):
                group.queue_on(operation, table, parts, rank, parts[rank].clone(), parts[0][0])
    group.peers.run()
    assert [group.peers.missing(rank) for rank in (0, 2)] == [[1], [1]]


@NIGHTLY
@pytest.mark.parametrize("stops", [False, True])
def test_one_thread_at_a_time_reads_the_stop_word_of_the_host(stops: bool) -> None:
    """Count the reads in an unused word of `missing`: on a GPU each takes 0.6 us, one after the other."""
    ticks, read = 3, "load_word(peers.stop)"
    assert source_text("peer_collectives.cu").count(read) == 1
    counted = f"(++peers.missing[RANKS - 1], {read})"
    group = emulated(2, timeout_ns=ticks << 17, mutate=lambda source: source.replace(read, counted))
    words = group.peers.words[0]
    words[-1] = int(stops)
    part = group.random(2, 64, torch.float32)
    with group.peers.on_rank(0) as table:
        group.queue_on("push", table, [part, part], 0, part.clone(), part[0])
    group.peers.run()
    assert group.peers.missing(0) == ([] if stops else [1]), "a stop ends a wait before the timeout"
    assert 1 <= words[-2] <= (1 if stops else ticks + 1)


# --- sums that GEMMs send ---------------------------------------------------------------------------------------------

PUSH_ROUND = 4 * (1024 * 8 + 1024 + 2)  # the place of push_round in Header of peer_protocol.cuh


@dataclass
class Products:
    """Products of all ranks, with columns of different numbers; rank 0 adds a bias."""

    group: PeerGroup
    rows: int
    columns: int
    dtype: torch.dtype
    fp8: bool = False
    share: int = 128  # columns of x on ranks with even numbers; the others have twice as many
    x: list[torch.Tensor] = field(init=False)
    weights: list[Matrix] = field(init=False)

    def __post_init__(self) -> None:
        shares = [self.share * (1 + rank % 2) for rank in range(self.group.size)]
        self.x = [self.group.random(self.rows, share, self.dtype) for share in shares]
        self.weights = [self._weight(share) for share in shares]
        self.bias = self.group.random(1, self.columns, self.dtype)[0]
        self.residual = self.group.random(self.rows, self.columns, self.dtype)

    def _weight(self, share: int) -> Matrix:
        if not self.fp8:
            return self.group.random(self.columns, share, self.dtype)
        data = self.group.random(self.columns, share, torch.float32).to(torch.float8_e4m3fn)
        return FP8Weight(data, torch.rand(self.columns // 16, share // 128), 16, 128)

    def arguments(self, rank: int) -> tuple[torch.Tensor, Matrix, torch.Tensor | None]:
        return self.x[rank], self.weights[rank], None if rank else self.bias

    def sums(self, sends: Callable[[int], bool]) -> list[torch.Tensor]:
        """Return each rank's new residual, and its norm; a rank's GEMM sends the product or stores it."""
        kernels, peers, results, E = self.group.kernels, self.group.peers, list[torch.Tensor](), emulator.emulated()
        for rank in range(self.group.size):
            residual, out = self.residual.clone(), torch.full_like(self.residual, torch.nan)
            last = residual, torch.ones_like(self.bias), EPS
            with peers.on_rank(rank) as table:
                if sends(rank):
                    assert E.can_send(*self.arguments(rank)[:2])
                    E.send_linear(*self.arguments(rank), table.fields, self.group.size)
                    kernels.receive_add_rms_norm(out, *last, table)
                else:
                    kernels.push_all_reduce_add_rms_norm(out, E.linear(*self.arguments(rank)), *last, table)
            results += [residual, out]
        peers.run()
        assert [peers.missing(rank) for rank in range(self.group.size)] == [[]] * self.group.size
        return results


@pytest.mark.parametrize(
    ("size", "blocks", "dtype", "fp8"),
    [
        (2, 8, torch.bfloat16, False),
        pytest.param(3, 2, torch.float16, False, marks=NIGHTLY),
        pytest.param(4, 2, torch.bfloat16, True, marks=NIGHTLY),
        pytest.param(3, 8, torch.float16, True, marks=NIGHTLY),
        pytest.param(8, 2, torch.bfloat16, False, marks=NIGHTLY),
    ],
)
def test_sums_that_gemms_send_have_the_bits_of_push(size: int, blocks: int, dtype: torch.dtype, fp8: bool) -> None:
    """Also if the GEMMs of some ranks store their results, between other pushes, and when the rounds overflow."""
    group = emulated(size, blocks=blocks)
    for memory in group.peers.memory:
        memory.fill_(0x7F)  # else empty mailboxes look like those of round 0
        memory[: group.kernels.HEADER_BYTES] = 0
        memory[PUSH_ROUND : PUSH_ROUND + 4].view(torch.int32).fill_(-6)
    for rows in range(1, 9):
        products = Products(group, rows, (64, 208, 512)[rows % 3], dtype, fp8)
        expected = products.sums(lambda rank: False)
        assert all(torch.equal(x, y) for x, y in zip(products.sums(lambda rank: True), expected, strict=True))
        if rows in (1, 5):
            some = products.sums(lambda rank: rank == 0)
            assert all(torch.equal(x, y) for x, y in zip(some, expected, strict=True))
            group.queue("push", rows, 64)
            group.check()


@pytest.mark.parametrize(("columns", "share"), [(64, 7424), pytest.param(8192, 128, marks=NIGHTLY)])
def test_large_sums_that_gemms_send_have_the_bits_of_push(columns: int, share: int) -> None:
    """128 KiB of sums, and 8 rows of 14,848 columns on rank 1, which do not fit into shared memory."""
    products = Products(emulated(2, blocks=8, threads=256), 8, columns, torch.bfloat16, share=share)
    expected = products.sums(lambda rank: False)
    assert all(torch.equal(x, y) for x, y in zip(products.sums(lambda rank: True), expected, strict=True))


GEMM_MUTATIONS: dict[str, tuple[str, str]] = {
    "one mailbox": ("(round % 2 * ranks + peers->rank)", "(0 * ranks + peers->rank)"),
    "no flag": ("(unsigned long long)round << 32 | word", "word"),
    "the last round": ("load_word(&header->push_round) + 1", "load_word(&header->push_round)"),
    "half of the vectors": ("at / 8 * 16 + half * PUSH_BYTES", "at / 8 * 16 + 0 * half * PUSH_BYTES"),
}


@NIGHTLY
@pytest.mark.parametrize("name", GEMM_MUTATIONS)
def test_errors_in_what_gemms_send_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = GEMM_MUTATIONS[name]
    products = Products(emulated(2, timeout_ns=100_000), 2, 64, torch.bfloat16)
    expected = products.sums(lambda rank: False)
    emulator.put_fault(monkeypatch, "skinny_gemm.cu", before, after)

    def twice() -> None:
        for _ in range(2):
            assert all(torch.equal(x, y) for x, y in zip(products.sums(lambda rank: True), expected, strict=True))

    with pytest.raises(AssertionError):
        twice()


def test_gemm_of_a_rank_that_has_waited_in_vain_sends_nothing() -> None:
    group = emulated(2, timeout_ns=100_000)
    products, E = Products(group, 1, 64, torch.bfloat16), emulator.emulated()
    with group.peers.on_rank(0) as table:
        E.send_linear(*products.arguments(0), table.fields, 2)
        out, residual = torch.empty_like(products.residual), products.residual.clone()
        group.kernels.receive_add_rms_norm(out, residual, torch.ones_like(products.bias), EPS, table)
    group.peers.run()
    assert group.peers.missing(0) == [1]
    word = int(group.peers.words[0][1])
    assert (group.kernels.OPERATIONS[word >> 32], word & 0xFFFFFFFF) == ("all_reduce_add_rms_norm", 1)
    before = group.peers.memory[1].clone()
    assert before.any(), "the first sum was sent"
    E.send_linear(*products.arguments(0), table.fields, 2)
    assert torch.equal(group.peers.memory[1], before)
