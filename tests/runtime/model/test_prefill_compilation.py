"""The compilation of FlashInfer's kernels while a rank loads its weights."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lockstep.runtime.model.attention import prefill_compilation
from lockstep.runtime.model.attention.prefill_compilation import PrefillCompilation
from lockstep.runtime.model.kv_pool import AttentionShape

from flashinfer_stand_in import StandInPrefill, flashinfer_stand_in
from waiting import holds_within

SHAPE = AttentionShape(
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=256,
    page_size=16,
    dtype=torch.bfloat16,
    kv_dtype=torch.float8_e4m3fn,
)


@pytest.fixture
def backend() -> Iterator[Any]:
    with flashinfer_stand_in():
        from lockstep.runtime.model.attention import flashinfer_backend

        yield flashinfer_backend


def test_one_token_is_planned_for_each_kind_of_window(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[dict[str, Any]] = []
    plan = StandInPrefill.plan

    def recorded(self: StandInPrefill, *sizes: Any, **options: Any) -> None:
        plan(self, *sizes, **options)
        plans.append(options | {"head_dim": self.shape[1], "rows": self.rows})

    monkeypatch.setattr(StandInPrefill, "plan", recorded)
    backend.compile_prefill(SHAPE, {None, 33, 50}, 2.0, torch.device("cpu"))
    assert sorted(plan["window_left"] >= 0 for plan in plans) == [False, True]
    for plan_options in plans:
        assert plan_options["q_data_type"] == torch.bfloat16
        assert plan_options["kv_data_type"] == torch.float8_e4m3fn
        assert plan_options["logits_soft_cap"] == 2.0
        assert (plan_options["head_dim"], plan_options["rows"]) == (256, [(0, 1, 1)])


@pytest.mark.parametrize("announce", [True, False])
def test_a_long_compilation_is_named(
    backend: Any, announce: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    compiled = threading.Event()
    monkeypatch.setattr(backend, "compile_prefill", lambda *_: compiled.wait(60))
    monkeypatch.setattr(prefill_compilation, "UNNAMED_S", 0.01)
    monkeypatch.setattr(prefill_compilation, "REPEATED_S", 0.02)
    compilation = PrefillCompilation(SHAPE, {None}, None)

    def end_compilation() -> None:
        holds_within(60 if announce else 0.1, lambda: len(caplog.records) > 1)
        compiled.set()

    threading.Thread(target=end_compilation).start()
    compilation.wait(announce=announce)
    lines = [record.getMessage() for record in caplog.records]
    assert (len(lines) > 1) == announce
    assert all("waiting for nvcc to compile FlashInfer's attention for heads of 256 elements" in line for line in lines)


def test_an_error_is_left_to_the_first_step(
    backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(backend, "compile_prefill", fail)
    PrefillCompilation(replace(SHAPE, head_dim=64), {None}, None).wait(announce=True)
    assert not caplog.records
