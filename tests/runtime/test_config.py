"""Values of Config that are refused, and the Config for processes in other working folders."""

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


@pytest.mark.parametrize("name", ["model", "generation_config", "revision"])
def test_empty_text_is_refused(name: str) -> None:
    """An empty path would be the current folder."""
    with pytest.raises(ValueError, match=f"{name}='' is empty; give a value"):
        Config.from_options({name: ""})
