"""The Config for processes in other working folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.runtime.config import Config


def test_with_absolute_model_resolves_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = Config(model="model", tensor_parallel_size=2).with_absolute_model()
    assert config == Config(model=str(tmp_path.resolve() / "model"), tensor_parallel_size=2)
    assert config.with_absolute_model() == config


def test_with_absolute_model_keeps_a_hub_id() -> None:
    assert Config(model="org/name").with_absolute_model() == Config(model="org/name")
