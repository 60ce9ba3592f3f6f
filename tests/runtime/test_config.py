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


@pytest.mark.parametrize("value", [-1, True, 2.0, "8"])
def test_piecewise_graphs_have_a_number_of_tokens_or_none(value: object) -> None:
    assert Config(piecewise_cuda_graph_max_tokens=0).piecewise_cuda_graph_max_tokens == 0
    with pytest.raises(ValueError, match=f"piecewise_cuda_graph_max_tokens={value!r} must be an integer >= 0"):
        Config.from_options({"piecewise_cuda_graph_max_tokens": value})
