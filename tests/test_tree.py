"""The law of the tree, checked on the source text: it runs without a GPU, torch or an install."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"kernels": 0, "comm": 1, "runtime": 2, "launch": 3}  # a package imports only lower floors
SOURCES = sorted(p for name in FLOORS for p in (ROOT / name).rglob("*.py"))
HEAVY = {"flashinfer", "cupy"}  # imported by the one module that uses each, never at a package's own import


def imports(path: Path) -> list[tuple[int, str]]:
    """(dots, dotted name) of everything `path` imports, at top level or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [(node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def package_of(path: Path, dots: int, name: str) -> str | None:
    """Which of our packages an import of `path` reaches, if any."""
    parts = path.relative_to(ROOT).parts
    if dots == 0:
        return name.split(".")[1] if name.startswith("lockstep.") else None
    base = parts[:-dots]
    full = [*base, *name.split(".")]
    return full[0] if full[0] in FLOORS else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_and_are_relative(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for dots, name in imports(path):
        assert not (dots == 0 and name.split(".")[0] == "lockstep"), f"write {name} as a relative import"
        reached = package_of(path, dots, name)
        assert reached is None or FLOORS[reached] <= FLOORS[own], f"{own} must not import {reached}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def signatures(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text())
    return {
        f.name: f"({ast.unparse(f.args)}) -> {ast.unparse(f.returns) if f.returns else None}"
        for f in tree.body
        if isinstance(f, ast.FunctionDef) and f.name[0] != "_"
    }


def test_every_op_has_a_definition_and_a_kernel_of_the_same_signature() -> None:
    ops = signatures(ROOT / "kernels/ops.py")
    assert ops == signatures(ROOT / "kernels/reference.py")
    kernels = {name: s for name, s in signatures(ROOT / "kernels/cuda.py").items() if name in ops}
    assert kernels == {name: s for name, s in ops.items() if "Tensor" in s}
    assert len(kernels) >= 6


def test_pyproject_lists_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1].replace('"', "").replace(",", " ").split())  # type: ignore[index]
    folders = {p.parent for name in FLOORS for p in (ROOT / name).rglob("__init__.py")}
    assert listed == {"lockstep"} | {f"lockstep.{'.'.join(p.relative_to(ROOT).parts)}" for p in folders}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_package_files_only_describe(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body), "a docstring and nothing else"


def test_heavy_libraries_have_one_home() -> None:
    users: dict[str, set[str]] = {name: set() for name in HEAVY}
    for path in SOURCES:
        for dots, name in imports(path):
            if dots == 0 and name.split(".")[0] in HEAVY:
                users[name.split(".")[0]].add(str(path.relative_to(ROOT)))
    assert all(len(where) <= 2 for where in users.values()), users
