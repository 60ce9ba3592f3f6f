"""Choosing an algorithm: all ranks have one table, of the slowest of them, and find it again at the next start."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from torch.distributed import HashStore

from lockstep.comm import autotune
from lockstep.comm.autotune import ALGORITHMS, SIZES, Algorithm, Table, autotune_all_reduce
from lockstep.comm.base import Communicator
from lockstep.comm.rendezvous import exchange

from ranks import run_ranks

SIZE = 3
Times = dict[Algorithm, list[float]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lockstep"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Times]:
    """What ranks have measured, each something else."""
    draw, found = random.Random(1), list[Times]()

    def measure(_: object) -> Times:
        found.append({name: [draw.uniform(1, 100) for _ in SIZES] for name in ALGORITHMS})
        return found[-1]

    monkeypatch.setattr(autotune, "_measure", measure)
    return found


def meet(places: list[str]) -> list[Table]:
    """The tables of ranks that start together."""
    store = HashStore()

    def one(comm: Communicator) -> Table:
        def say(topic: str, word: str) -> list[str]:
            return exchange(store, topic, word, comm.rank, comm.size, 10.0)

        return autotune_all_reduce(dict.fromkeys(ALGORITHMS, comm), places[comm.rank], say)

    return run_ranks(SIZE, one)


def test_the_slowest_rank_counts_and_all_have_one_table(folder: Path, measured: list[Times]) -> None:
    tables = meet(["a", "b", "c"])
    assert len(measured) == SIZE
    for name in ALGORITHMS:
        assert tables[0].us[name] == [max(times[name][column] for times in measured) for column in range(len(SIZES))]
    assert tables == [tables[0]] * SIZE
    assert not tables[0].remembered


def test_the_next_start_on_the_same_gpus_measures_nothing(folder: Path, measured: list[Times]) -> None:
    (first, *_), (again, *others) = meet(["a", "b", "c"]), meet(["a", "b", "c"])
    assert len(measured) == SIZE
    assert again.remembered
    assert (again.sizes, again.us, again.best()) == (first.sizes, first.us, first.best())
    assert others == [again] * (SIZE - 1)
    meet(["a", "b", "another GPU"])
    assert len(measured) == 2 * SIZE


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"key": "another", "table": {}}', "\x00\xff"])
def test_what_cannot_be_read_is_measured_again(content: str, folder: Path, measured: list[Times]) -> None:
    meet(["a", "b", "c"])
    (file,) = folder.iterdir()
    file.write_text(content)
    assert not meet(["a", "b", "c"])[0].remembered
    assert meet(["a", "b", "c"])[0].remembered


def test_a_folder_that_cannot_be_written_costs_a_measurement(
    tmp_path: Path, measured: list[Times], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    for _ in range(2):
        assert not meet(["a", "b", "c"])[0].remembered
    assert "cannot remember who adds up fastest" in caplog.text


def test_the_table_is_for_people() -> None:
    table = Table([8192, 8 << 20], {"nccl": [20.04, 90.0], "one-shot": [5.0, 120.0], "two-shot": [7.0, 95.0]})
    assert [line.split() for line in table.lines()] == [
        ["all-reduce", "+", "norm,", "us", "8", "KiB", "8", "MiB"],
        ["nccl", "20.0", "90.0*"],
        ["one-shot", "5.0*", "120.0"],
        ["two-shot", "7.0", "95.0"],
    ]
    assert table.best() == [(8192, "one-shot")]
