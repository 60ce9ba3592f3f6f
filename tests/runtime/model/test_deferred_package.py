"""A module of a package is imported without the package's own code, which runs when somebody needs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.runtime.model.attention.deferred_package import import_alone

PACKAGE = """
ORDER.append("package")
from .heavy import weigh
from .light import name
__version__ = "7"
"""
MODULES = {
    "light": 'from . import heavy_names\nORDER.append("light")\nname = "light " + heavy_names.suffix\n',
    "heavy_names": 'suffix = "!"\n',
    "heavy": 'ORDER.append("heavy")\nweigh = len\n',
    "needy": 'from . import weigh\nORDER.append("needy")\n',
    "first": "import sys\nif not hasattr(sys.modules[__package__], 'absent'):\n    raise RuntimeError('too early')\n",
}


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The order in which the code of a package `deferred` runs; each of its modules has ORDER."""
    folder = tmp_path / "deferred"
    folder.mkdir()
    names = {"__init__": PACKAGE} | MODULES
    for name, source in names.items():
        (folder / f"{name}.py").write_text(f"from deferred_order import ORDER\n{source}")
    (tmp_path / "deferred_order.py").write_text("ORDER = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("deferred_order").ORDER
    for name in [name for name in sys.modules if name.partition(".")[0] in ("deferred", "deferred_order")]:
        del sys.modules[name]


def test_module_is_imported_without_the_code_of_its_package(order: list[str]) -> None:
    assert import_alone("deferred", "light").name == "light !"
    assert order == ["light"]
    assert importlib.import_module("deferred").heavy_names.suffix == "!"
    assert order == ["light"]


def test_code_of_the_package_runs_once_when_it_is_needed(order: list[str]) -> None:
    light = import_alone("deferred", "light")
    package = importlib.import_module("deferred")
    assert package.weigh is len
    assert package.__version__ == "7"
    assert package.light is light
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing
    assert order == ["light", "package", "heavy"]


def test_module_that_needs_the_package_gets_it(order: list[str]) -> None:
    assert import_alone("deferred", "needy").weigh is len
    assert order == ["package", "heavy", "light", "needy"]


def test_package_that_is_imported_stays(order: list[str]) -> None:
    package = importlib.import_module("deferred")
    assert import_alone("deferred", "light") is package.light
    assert order == ["package", "heavy", "light"]


def test_failure_is_that_of_the_usual_import(order: list[str]) -> None:
    with pytest.raises(RuntimeError, match="too early"):
        import_alone("deferred", "first")
    assert order == ["package", "heavy", "light"] * 2
    assert importlib.import_module("deferred").weigh is len
    with pytest.raises(ModuleNotFoundError):
        import_alone("deferred_that_is_missing", "light")
