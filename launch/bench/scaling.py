"""The speed of several GPUs compared with the saved result of fewer: `lockstep bench latency|throughput --baseline`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # what --output-json holds of one workload


class Baseline:
    """The results in a file that an earlier `--output-json` wrote, one for each of the workloads in `shapes`.

    shapes  the fields that describe each workload, as the results hold them
    Raises ValueError if the file cannot be read, is of another model, or lacks a workload.
    """

    def __init__(self, path: Path, model: str, shapes: Sequence[Result]) -> None:
        results = _read(path)
        self._results = [_find(path, results, {"model": model, **shape}) for shape in shapes]

    def compare(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Return the fields that each result gets: baseline_tensor_parallel_size, speedup, scaling_efficiency."""
        return [_compare(result, before) for result, before in zip(results, self._results, strict=True)]


def scaling_line(result: Result) -> str:
    """Return the human-readable form of these fields."""
    return (
        f"Scaling: {result['speedup']:.2f} times the speed of"
        f" tensor_parallel_size={result['baseline_tensor_parallel_size']}, {result['scaling_efficiency']:.1%} of linear"
    )


def _read(path: Path) -> list[Result]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--baseline {path} cannot be read: {error}") from error
    results = content if isinstance(content, list) else [content]
    if not all(isinstance(result, dict) and "tensor_parallel_size" in result for result in results):
        raise ValueError(f"--baseline {path} is no file that --output-json of this command has written")
    return results


def _find(path: Path, results: list[Result], shape: Result) -> Result:
    for result in results:
        if all(result.get(name) == value for name, value in shape.items()):
            return result
    description = ", ".join(f"{name}={value}" for name, value in shape.items())
    raise ValueError(
        f"--baseline {path} has no result of {description}; measure that with fewer ranks, and --output-json"
    )


def _compare(result: Result, before: Result) -> dict[str, Any]:
    ranks, ranks_before = result["tensor_parallel_size"], before["tensor_parallel_size"]
    speedup = _speed(result) / _speed(before)
    return {
        "baseline_tensor_parallel_size": ranks_before,
        "speedup": speedup,
        "scaling_efficiency": speedup * ranks_before / ranks,
    }


def _speed(result: Result) -> float:
    """Return tokens per second: of a request's stream in a latency result if it has one, else of all requests."""
    ms = result.get("ms_per_output_token")
    return float(1e3 / ms if ms else result["output_tokens_per_second"])
