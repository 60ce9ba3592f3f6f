"""The choice of the FP8 GEMM by its times, without a GPU; and on one, that tuning sets it for every shape."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
import torch

from lockstep.comm.base import SingleRank
from lockstep.comm.timing import IMPORT_THREAD
from lockstep.kernels import ops
from lockstep.kernels.arguments import FP8Choice, FP8Weight
from lockstep.runtime.model import fp8_tuning

from kernel_cases import random_fp8, to_device

SLOW, FAST = [20.0] * 5, [10.0] * 5
TIME = fp8_tuning._us


@pytest.mark.parametrize(
    ("tiled", "library", "rows"),
    [
        (FAST, SLOW, 256),
        (SLOW, FAST, 0),
        ([5, 6, 8, 20, 40], [14, 14, 14, 15, 16], 64),
        ([10, 10, 10, 10, 10], [9.6, 10, 9, 30, 30], 32),  # nearly equal; then slower, whatever follows
    ],
)
def test_tiled_rows_are_those_before_the_library_is_faster(tiled: list[float], library: list[float], rows: int) -> None:
    assert fp8_tuning.tiled_rows(tiled, library) == rows


class Peers(SingleRank):
    """A rank whose peer took twice as long with fp8_gemm."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, x * torch.tensor([[2.0], [1.0]]) if x.is_floating_point() else x])


def test_ranks_choose_by_the_slowest_for_each_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    imports = threading.Thread(target=time.sleep, args=(0.2,), name=IMPORT_THREAD)

    def us(comm: Any, x: torch.Tensor, weights: list[FP8Weight], *, tiled_rows: int) -> float:
        assert not imports.is_alive()
        return len(x) * (1.0 if tiled_rows else 0.1) / (1 if weights[0].shape[0] == 256 else 1000) + 8 * (
            tiled_rows == 0
        )

    monkeypatch.setattr(fp8_tuning, "_us", us)
    monkeypatch.setattr(fp8_tuning, "_compile", lambda *_: None)
    monkeypatch.setattr(ops, "has_two_fp8_gemms", lambda x, weight: weight.columns == 128)
    choices = FP8Choice(), FP8Choice(), FP8Choice()
    weights = [random_fp8(256, 128, 128, 128)._replace(choice=choices[0]) for _ in range(3)]
    weights += [random_fp8(384, 128, 128, 128)._replace(choice=choices[1])]
    weights += [random_fp8(16, 128, 1, 256)._replace(choice=choices[2])]
    imports.start()
    with caplog.at_level(logging.INFO):
        fp8_tuning.tune_fp8_gemms(weights, Peers(), torch.bfloat16)
    assert [choice.tiled_rows for choice in choices] == [0, 256, 64]
    assert "FP8 GEMM [256, 128]: cuBLAS (us by rows, fp8_gemm / cuBLAS: 16: 32.0 / 9.6" in caplog.text
    assert "FP8 GEMM [384, 128]: fp8_gemm up to 256 rows, cuBLAS beyond" in caplog.text


class Unlike(SingleRank):
    """A rank whose peer has other kinds of weights."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        assert not x.is_floating_point()  # no times are exchanged
        return torch.stack([x, x + 1])


def test_ranks_with_unlike_weights_time_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ops, "has_two_fp8_gemms", lambda *_: True)
    monkeypatch.setattr(fp8_tuning, "_us", lambda *_, **options: pytest.fail("timed"))
    weight = random_fp8(256, 128, 128, 128)._replace(choice=FP8Choice())
    with caplog.at_level(logging.INFO):
        fp8_tuning.tune_fp8_gemms([weight], Unlike(), torch.bfloat16)
    assert weight.choice.tiled_rows == 64
    assert "not timed: ranks have unequal shares" in caplog.text


def timed_without_compiling(*arguments: Any, **options: Any) -> float:
    from lockstep.kernels.cuda import kernel_launch

    compiled = kernel_launch._compile.cache_info().misses
    us = TIME(*arguments, **options)
    assert kernel_launch._compile.cache_info().misses == compiled
    return us


@pytest.mark.gpu
def test_tuning_on_a_gpu_times_both(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_tuning, "_us", timed_without_compiling)
    weights = [to_device(random_fp8(512, 1024, 128, 128), "cuda")._replace(choice=FP8Choice(1)) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        fp8_tuning.tune_fp8_gemms(weights, SingleRank(), torch.bfloat16)
    assert all(weight.choice.tiled_rows in (0, *fp8_tuning.ROWS) for weight in weights)
    assert "FP8 GEMM [512, 1024]" in caplog.text
