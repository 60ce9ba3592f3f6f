"""`lockstep bench comm`: tables, JSON and plot agree, wrong results are counted, invalid options are refused."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from lockstep.comm.all_reduce_policy import AllReducePolicy
from lockstep.comm.base import Communicator
from lockstep.kernels.arguments import Matrix
from lockstep.launch.bench.comm_actor import CommBenchActor, CommunicatorAllReduce, GemmAllReduce
from lockstep.launch.bench.comm_command import parse_bytes
from lockstep.launch.bench.comm_report import AlgorithmTimings, CommBenchSpec, TableLine, Timing, lines
from lockstep.launch.cli.main import app
from lockstep.runtime.config import Config

from ranks import run_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "comm", "--device=cpu", *arguments])


def spec(**changes: Any) -> CommBenchSpec:
    usual = {"sizes": [64, 4096], "dtype": "float32", "hidden_size": 128, "algorithms": []}
    return CommBenchSpec(**{**usual, "warmup": 0, "times": 1, "graph_length": 1, **changes})


def test_two_ranks_over_gloo(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "comm.json", tmp_path / "comm.png"
    sizes = ["-b", "1K", "-e", "64K", "-f", "8", "--hidden-size", "384", "-n", "3"]
    result = bench("--tp=2", *sizes, "--output-json", str(files[0]), "--plot", str(files[1]))
    assert result.exit_code == 0, result.output
    found = json.loads(files[0].read_text())
    assert found["num_ranks"] == len(found["ranks"]) == 2
    assert [block["algorithm"] for block in found["blocks"]] == ["gloo", "gloo + norm"]
    rows = re.findall(
        r"^ +(\d+) +(\d+) +bfloat16 +sum +N/A +N/A +N/A +N/A +([\d.]+) +[\d.]+ +[\d.]+ +0$", result.stdout, re.M
    )
    told = [line for block in found["blocks"] for line in block["lines"]]
    assert len(rows) == len(told) == 6
    for (size, count, time), line in zip(rows, told, strict=True):
        assert (int(size), int(count), 2 * line["count"]) == (line["size"], line["count"], line["size"])
        assert float(time) == pytest.approx(line["in_place"]["time_us"], abs=0.006)
        assert line["out_of_place"] is None
    assert [line["size"] for line in told[3:6]] == [768, 7680, 65280]  # whole rows of 384
    assert "# Out of bounds values : 0 OK" in result.stdout
    assert files[1].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_refused_algorithms_have_a_reason_and_json_is_all_that_is_printed(ray_cluster: dict[str, str]) -> None:
    names = ("push", "push fused", "one-shot", "two-shot fused", "push by GEMM", "nccl", "nccl + norm")
    result = bench("--tp=2", "-e1K", "--json", "--dtype=float32", *(f"--algorithm={name}" for name in (*names, "gloo")))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["refused"] == dict.fromkeys(names, "needs GPUs")
    assert [block["type"] for block in found["blocks"]] == ["float"]


def test_baselines_are_timed_in_the_same_tables(
    ray_cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "comm.json"
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    script = importlib.import_module("bench_comm_baselines")
    ray.cloudpickle.register_pickle_by_value(script)  # as for a script, which the ranks cannot import
    monkeypatch.setattr(sys, "argv", ["", "--tp=2", "--device=cpu", "-b1K", "-e4K", "--output-json", str(results)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert not ended.value.code
    report = json.loads(results.read_text())
    assert report["refused"] == dict.fromkeys(("one-shot", "nccl", "nccl window", "flashinfer"), "needs GPUs")
    assert [block["algorithm"] for block in report["blocks"]] == ["torch.distributed"]
    assert [line["size"] for line in report["blocks"][0]["lines"]] == [1024, 4096]
    assert "# Out of bounds values : 0 OK" in capsys.readouterr().out


class Wrong(Communicator):
    """A communicator of threads whose sums have some wrong elements."""

    def __init__(self, real: Communicator, errors: int) -> None:
        self.rank, self.size, self.capturable = real.rank, real.size, False
        self.real, self.errors = real, errors

    def all_reduce(self, x: Tensor) -> Tensor:
        out = self.real.all_reduce(x.clone())
        out.view(-1)[: self.errors] += 1e-3
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        return self.real.all_gather(x)

    def barrier(self) -> None:
        self.real.barrier()


@pytest.mark.parametrize("errors", [0, 5])
def test_wrong_elements_are_counted(errors: int) -> None:
    def rank(comm: Communicator) -> list[int]:
        actor = CommBenchActor(comm.rank, comm.size, Config(device="cpu", tensor_parallel_size=3), {})
        wrong = Wrong(comm, errors)
        actor._comm, actor._device, actor.spec, actor.dtype = wrong, CPU, spec(), torch.float32
        actor._algorithms = {
            "plain": CommunicatorAllReduce(wrong, CPU),
            "completed": CommunicatorAllReduce(wrong, CPU, 128),
        }
        rows = [row for name in actor._algorithms for row in actor.measure(name, "eager")]
        return [row.in_place.wrong for row in rows if row.in_place]

    for plain_16, plain_1024, completed_16, completed_1024 in run_ranks(3, rank):
        assert plain_16 == plain_1024 == errors
        assert completed_16 >= 2 * errors or errors == 0  # the residual stream and its norm
        assert (completed_16 == 0) == (completed_1024 == 0) == (errors == 0)


class Pushing(Wrong):
    """The same with GEMMs that push up to eight rows, as the log says."""

    def __init__(self, real: Communicator, errors: int, log: list[str], gemm_bytes: int = 1 << 16) -> None:
        super().__init__(real, errors)
        self.policy, self.log = AllReducePolicy(((1 << 16, "push"),), gemm_bytes=gemm_bytes), log

    def with_policy(self, policy: AllReducePolicy) -> Pushing:
        return Pushing(self.real, self.errors, self.log, policy.gemm_bytes)

    def gemms_push(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        return self.policy.lets_gemms_push(rows, columns, dtype)

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
        self.log.append("sent" if self.gemms_push(len(x), len(weight), x.dtype) else "stored")  # type: ignore[arg-type]
        return super().linear(x, weight, bias)


@pytest.mark.parametrize("pushes", [False, True])
def test_sums_of_gemms_are_timed_where_gemms_push(pushes: bool) -> None:
    def rank(comm: Communicator) -> tuple[list[int | None], set[str]]:
        log: list[str] = []
        comm = Pushing(comm, 0, log)
        actor = CommBenchActor(comm.rank, comm.size, Config(device="cpu", tensor_parallel_size=2), {})
        actor._comm, actor._device, actor.spec = comm, CPU, spec(sizes=[256, 2048, 4096], dtype="bfloat16")
        actor.dtype = torch.bfloat16
        actor._algorithms = {"": GemmAllReduce(comm, CPU, 128, pushes=pushes)}  # type: ignore[arg-type]
        cells = [line.out_of_place for line in actor.measure("", "eager")]
        return [cell and cell.wrong for cell in cells], set(log)

    for (one_row, eight_rows, sixteen_rows), log in run_ranks(2, rank):
        assert one_row == eight_rows == 0
        assert sixteen_rows is None
        assert log == {"sent" if pushes else "stored"}


def test_block_has_the_slowest_rank_and_all_wrong_elements() -> None:
    ranks = [[TableLine(1000, 250, None, Timing.from_time(us, 1000, 2, wrong))] for us, wrong in ((4.0, 1), (5.0, 2))]
    block = AlgorithmTimings.from_ranks("nccl", "graph", "float32", ranks)
    (line,) = block.lines
    assert line.in_place is not None
    assert (line.in_place.time_us, line.in_place.wrong, line.best_us) == (5.0, 3, 5.0)
    assert line.in_place.algbw == line.in_place.busbw == 0.2  # 2 (n - 1) / n = 1
    assert list(lines(block))[-1].split() == [
        "1000", "250", "float", "sum", "N/A", "N/A", "N/A", "N/A", "5.00", "0.20", "0.20", "3",
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), [("8", 8), ("4K", 4096), ("2m", 2 << 20), ("1G", 1 << 30)])
def test_parse_bytes(text: str, number: int) -> None:
    assert parse_bytes("min_bytes", text) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one rank has no peer to communicate with; give --tp 2 or more"),
        (["--tp=2", "-b4Q"], "min_bytes='4Q' is no number of bytes; write 8, 4K, 1M or 1G"),
        (["--tp=2", "-b2M", "-e1M"], "min_bytes=2M is above max_bytes=1M"),
        (["--tp=2", "-b1"], "min_bytes=1 holds no bfloat16, which has 2 bytes"),
        (["--tp=2", "--dtype=int8"], "dtype='int8' is not one of float32, bfloat16, float16"),
        (["--tp=2", "--algorithm=ring"], "algorithm='ring' is not one of push, one-shot, two-shot, "),
        (["--tp=2", "--plot=/nowhere/x.png"], "cannot write /nowhere/x.png: there is no folder /nowhere"),
        (["--tp=2", "--nccl-library=/opt/libnccl.so.2"], "nccl_library is for ranks on GPUs"),
    ],
)
def test_invalid_options_are_refused_before_the_start(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
