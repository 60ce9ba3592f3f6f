"""The collectives of several ranks against sums in rank order, on a CPU, without a GPU (peer_emulator.py)."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from lockstep.kernels.native import source_text

from peer_emulator import PeerEmulator
from peer_group import FUSED, PLAIN, PeerGroup, queue_all

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
        pytest.param(8, torch.bfloat16, marks=NIGHTLY),
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
    assert {name for _, name, *_ in group.peers._launches} <= set(names)


@NIGHTLY
def test_push_has_the_bits_of_one_shot_in_any_layout() -> None:
    results = []
    for operation, threads, blocks in (("one-shot", 64, 1), ("one-shot", 128, 8), ("push", 64, 3), ("push", 32, 1)):
        group = emulated(2, threads=threads, blocks=blocks)
        group.queue(f"{operation} fused", 3, 512)
        results.append([result for _, result, *_ in group.expectations])
        group.check()
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


MUTATIONS: dict[str, tuple[str, str]] = {
    "a signal without a fence": ("store_release(signal, round)", "*signal = round"),
    "no barrier before a signal": ("__syncthreads();\n        ++round;", "++round;"),
    "one mailbox": ("const int turn = ++round % 2 * N;", "const int turn = 0 * ++round;"),
    "half of the flags": ("half.x >> 32 == round && half.y >> 32 == round", "half.x >> 32 == round"),
    "no wait for signals": (">= 0; });", ">= -1; });"),
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
            group.check()

    with pytest.raises(AssertionError):
        some_attempt_fails()


@pytest.mark.parametrize("operation", ["push", *(pytest.param(name, marks=NIGHTLY) for name in (*PLAIN[1:], *FUSED))])
def test_missing_rank_is_named(operation: str) -> None:
    group = emulated(3, timeout_ns=100_000)
    parts = [group.random(2, 64, torch.float32) for _ in range(3)]
    for rank in (0, 2):
        with group.peers.on_rank(rank) as table:
            for _ in range(2):
                group.queue_on(operation, table, parts, rank, parts[rank].clone(), parts[0][0])
    group.peers.run()
    assert all(1 in group.peers.missing(rank) for rank in (0, 2))


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
