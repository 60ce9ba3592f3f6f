"""`--baseline`: the speedup over a saved result of fewer ranks, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.launch.bench.scaling import Baseline, scaling_line

SHAPE = {"batch_size": 8, "input_len": 128}


def saved(folder: Path, content: Any) -> Path:
    path = folder / "tp1.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def result(ranks: int, ms: float | None, tokens_per_second: float, **shape: Any) -> dict[str, Any]:
    speeds = {"ms_per_output_token": ms, "output_tokens_per_second": tokens_per_second}
    return {"model": "org/m", "tensor_parallel_size": ranks, **speeds, **(shape or SHAPE)}


def test_speedup_is_of_the_time_per_token(tmp_path: Path) -> None:
    path = saved(tmp_path, [result(1, 9.0, 1.0, batch_size=1, input_len=128), result(1, 4.0, 1.0)])
    [found] = Baseline(path, "org/m", [SHAPE]).compare([result(4, 1.6, 1.0)])
    assert found == {"baseline_tensor_parallel_size": 1, "speedup": 2.5, "scaling_efficiency": 0.625}
    assert scaling_line(found) == "Scaling: 2.50 times the speed of tensor_parallel_size=1, 62.5% of linear"


def test_speedup_of_throughput_and_of_single_tokens_is_that_of_all_requests(tmp_path: Path) -> None:
    path = saved(tmp_path, result(2, None, 100.0, preset="nano"))
    [found] = Baseline(path, "org/m", [{"preset": "nano"}]).compare([result(4, None, 150.0, preset="nano")])
    assert found == {"baseline_tensor_parallel_size": 2, "speedup": 1.5, "scaling_efficiency": 0.75}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"tp1.json cannot be read: Expecting property name"),
        ("[1]", r"tp1.json is no file that --output-json"),
        (result(1, 4.0, 1.0, batch_size=1), r"has no result of model=org/m, batch_size=8, input_len=128; measure"),
        (result(1, 4.0, 1.0) | {"model": "org/other"}, r"has no result of model=org/m, batch_size=8"),
    ],
)
def test_file_that_does_not_fit_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Baseline(saved(tmp_path, content), "org/m", [SHAPE])


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--baseline .*none.json cannot be read: "):
        Baseline(tmp_path / "none.json", "org/m", [SHAPE])
