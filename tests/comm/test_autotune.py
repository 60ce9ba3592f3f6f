"""Auto-tuning: all ranks have one table, of the slowest rank, and read it from the cache at the next start."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import get_args

import pytest
from torch.distributed import HashStore

from lockstep.comm import all_reduce_policy, timing
from lockstep.comm.all_reduce_policy import SIZES, AllReduceAlgorithm, AllReduceTimings, autotune_all_reduce
from lockstep.comm.base import Communicator
from lockstep.comm.rendezvous import Rendezvous
from lockstep.comm.timing import IMPORT_THREAD

from ranks import run_ranks

SIZE = 3
ALGORITHMS: tuple[AllReduceAlgorithm, ...] = get_args(AllReduceAlgorithm)
Times = dict[AllReduceAlgorithm, list[float]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lockstep"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Times]:
    """The times that each rank measures, all different."""
    generator, times = random.Random(1), list[Times]()

    def measure(_: object) -> Times:
        times.append({name: [generator.uniform(1, 100) for _ in SIZES] for name in ALGORITHMS})
        return times[-1]

    monkeypatch.setattr(all_reduce_policy, "_measure", measure)
    return times


def tune(environments: list[str]) -> list[AllReduceTimings]:
    """The tables of ranks that start together, one environment each."""
    store = HashStore()

    def one(comm: Communicator) -> AllReduceTimings:
        rendezvous = Rendezvous(store, comm.rank, comm.size, 10.0)
        return autotune_all_reduce(dict.fromkeys(ALGORITHMS, comm), environments[comm.rank], rendezvous)

    return run_ranks(SIZE, one, in_turns=False)  # they wait at the rendezvous, too


def test_table_has_the_times_of_the_slowest_rank(folder: Path, measured: list[Times]) -> None:
    tables = tune(["a", "b", "c"])
    assert len(measured) == SIZE
    for name in ALGORITHMS:
        assert tables[0].us[name] == [max(times[name][column] for times in measured) for column in range(len(SIZES))]
    assert tables == [tables[0]] * SIZE
    assert not tables[0].cached


def test_times_are_taken_after_imports(folder: Path, measured: list[Times]) -> None:
    times_taken: list[int] = []

    def import_modules() -> None:
        time.sleep(0.2)
        times_taken.append(len(measured))

    threading.Thread(target=import_modules, name=IMPORT_THREAD).start()
    tune(["a", "b", "c"])
    assert times_taken == [0]
    assert len(measured) == SIZE


def test_imports_without_an_end_do_not_hold_a_start(
    folder: Path, measured: list[Times], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timing, "IMPORTS_END_S", 0.05)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name=IMPORT_THREAD)
    thread.start()
    try:
        tune(["a", "b", "c"])
    finally:
        end.set()
    thread.join()
    assert len(measured) == SIZE
    assert "timing while modules are imported" in caplog.text


def test_cached_table_is_used_on_the_same_gpus(folder: Path, measured: list[Times]) -> None:
    (first, *_), (again, *others) = tune(["a", "b", "c"]), tune(["a", "b", "c"])
    assert len(measured) == SIZE
    assert again.cached
    assert (again.sizes, again.us, again.thresholds()) == (first.sizes, first.us, first.thresholds())
    assert others == [again] * (SIZE - 1)
    tune(["a", "b", "another GPU"])
    assert len(measured) == 2 * SIZE


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"key": "another", "table": {}}', "\x00\xff"])
def test_unreadable_cache_is_measured_again(
    content: str, folder: Path, measured: list[Times], caplog: pytest.LogCaptureFixture
) -> None:
    tune(["a", "b", "c"])
    (file,) = folder.iterdir()
    file.write_text(content)
    assert not tune(["a", "b", "c"])[0].cached
    assert ("cannot read the cached times of the all-reduce algorithms" in caplog.text) == ("another" not in content)
    assert tune(["a", "b", "c"])[0].cached


def test_unwritable_cache_costs_a_measurement(
    tmp_path: Path, measured: list[Times], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    for _ in range(2):
        assert not tune(["a", "b", "c"])[0].cached
    assert "cannot cache the times of the all-reduce algorithms" in caplog.text


def test_table_lines_and_thresholds() -> None:
    table = AllReduceTimings(
        [8192, 8 << 20], {"nccl": [20.04, 90.0], "one-shot": [5.0, 120.0], "two-shot": [7.0, 95.0]}
    )
    assert [line.split() for line in table.lines()] == [
        ["all-reduce", "+", "norm,", "us", "8", "KiB", "8", "MiB"],
        ["nccl", "20.0", "90.0*"],
        ["one-shot", "5.0*", "120.0"],
        ["two-shot", "7.0", "95.0"],
    ]
    assert table.thresholds() == [(8192, "one-shot")]
