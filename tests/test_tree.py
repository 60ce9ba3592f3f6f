"""The rules of the tree, checked on the source text: no GPU, no torch and no installation is needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "comm", "runtime", "launch")
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
CODE = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".cpp"))
MODULES = [p for p in SOURCES if p.name != "__init__.py"]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
PARTICIPLES = {"found", "own", "given", "told", "asked", "wanted", "who", "whose"}  # they do not say of what
MAX_ROOM_SHARE = 0.25
HEAVY = {  # by whom they are imported
    "cupy": ["kernels/cuda/kernel_launch.py", "kernels/peer_memory.py"],
    "flashinfer": ["runtime/model/attention/flashinfer_backend.py"],
}

# From the bottom to the top: a module imports from its own room and from those above it in this list. A folder is one
# room, or several: then the modules of the lower one are named.
ROOMS = """
kernels: argument_checks arguments expert_checks mxfp4_order native random_noise reference state_reference
kernels/cuda
kernels
comm
runtime: chat_template config limits outputs plan request sampling_params startup_timer stats structured_outputs version
runtime/model: batch checkpoint delta_net_config end_tokens expert_config families fp8_tuning fp8_weights fused_experts gpt_oss_moe generation_config hf_config kv_pool layer_groups layer_rules linear model_config moe norm quantization rank_shares rope state_pool tensor_files tokenizer_files weights
runtime/model/attention
runtime/model
runtime/memory
runtime/sampling
runtime/scheduler
runtime/runner
runtime/chat
runtime
launch: child_process errors http_client leader_client leader_executor open_files options signals standard_streams text_process
launch/cluster
launch/replicas
launch
launch/engine
launch/doctor
launch/server/protocol
launch/server
launch/bench
launch/cli
""".strip().splitlines()  # noqa: E501


def room_of(path: Path) -> int:
    """Return the number of a module's room, counted from the bottom."""
    folder = path.parent.relative_to(ROOT).as_posix()
    for number, room in enumerate(ROOMS):
        name, _, modules = room.partition(": ")
        if folder == name and (not modules or path.stem in modules.split()):
            return number
    raise AssertionError(f"{path.relative_to(ROOT)} is in no room of ROOMS")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (dots, dotted name) of everything that a module imports, at top level or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.level, f"{node.module or ''}.{alias.name}".strip(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name


def imported_modules(path: Path) -> Iterator[Path]:
    """Yield the modules of ours that a module imports by relative imports."""
    for dots, name in imports(path):
        if dots:
            base = path.parents[dots - 1]
            parts = name.split(".")
            for length in (len(parts), len(parts) - 1):  # `from . import module` or `from .module import name`
                module = base.joinpath(*parts[:length]).with_suffix(".py")
                if length and module in MODULES:
                    yield module
                    break


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_are_relative(path: Path) -> None:
    assert not [name for dots, name in imports(path) if dots == 0 and name.split(".")[0] == "lockstep"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_the_order_of_rooms(path: Path) -> None:
    room = room_of(path)
    upward = {f"{name_of(m)} in room '{ROOMS[room_of(m)]}'" for m in imported_modules(path) if room_of(m) > room}
    assert not upward, f"{name_of(path)} in room '{ROOMS[room]}' must not import {sorted(upward)}"


def test_modules_form_no_cycle() -> None:
    graph = {module: set(imported_modules(module)) - {module} for module in MODULES}
    while leaves := [module for module, targets in graph.items() if not targets]:
        for leaf in leaves:
            del graph[leaf]
        for targets in graph.values():
            targets.difference_update(leaves)
    assert not graph, f"in a cycle, or above one: {sorted(map(name_of, graph))}"


def test_every_room_has_modules() -> None:
    assert {room_of(path) for path in MODULES} == set(range(len(ROOMS)))
    for room in ROOMS:
        folder, _, modules = room.partition(": ")
        missing = [name for name in modules.split() if not (ROOT / folder / f"{name}.py").exists()]
        assert not missing, f"{room} names modules that do not exist: {missing}"


def test_base_names_are_unique() -> None:
    names = [path.name for path in CODE if path.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}


def test_public_class_names_are_unique() -> None:
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name[0] != "_":
                homes.setdefault(node.name, []).append(name_of(path))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short(path: Path) -> None:
    """Count the lines of each body without its docstring."""
    for function in functions(path):
        first = function.body[ast.get_docstring(function, clean=False) is not None :][:1]
        length = sum(function.body[-1].end_lineno - node.lineno + 1 for node in first)  # type: ignore[operator]
        assert length <= MAX_FUNCTION_LINES, f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_variables_are_named_for_what_they_hold(path: Path) -> None:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add((node.id if isinstance(node, ast.Name) else node.attr).strip("_"))
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    assert not names & PARTICIPLES


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


def test_no_room_has_more_than_a_quarter_of_the_source() -> None:
    lines: dict[Path, int] = {}
    for path in CODE:
        lines[path.parent] = lines.get(path.parent, 0) + len(path.read_text().splitlines())
    limit = MAX_ROOM_SHARE * sum(lines.values())
    assert not {name_of(folder): count for folder, count in lines.items() if count > limit}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_have_docstrings(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def signatures(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text())
    return {
        f.name: f"({ast.unparse(f.args)}) -> {ast.unparse(f.returns) if f.returns else None}"
        for f in tree.body
        if isinstance(f, ast.FunctionDef) and f.name[0] != "_"
    }


def test_ops_have_a_definition_and_a_kernel_of_the_same_signature() -> None:
    files = [ROOT / f"kernels/{name}.py" for name in ("ops", "state_ops", "expert_ops")]
    ops = {name: s for file in files for name, s in signatures(file).items() if name != "op"}
    assert ops == signatures(ROOT / "kernels/reference.py") | signatures(ROOT / "kernels/state_reference.py")
    named = [match for file in files for match in re.findall(r'@op\("(\w+)"\)\ndef (\w+)', file.read_text())]
    kernels = {name: signatures(ROOT / f"kernels/cuda/{module}.py").get(name) for module, name in named}
    assert kernels == {name: s for name, s in ops.items() if "Tensor" in s}
    assert len(kernels) >= 6


def test_pyproject_lists_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)[1].replace('"', "").replace(",", " ").split())  # type: ignore[index]
    folders = {p.parent for name in PACKAGES for p in (ROOT / name).rglob("__init__.py")}
    assert listed == {"lockstep"} | {f"lockstep.{'.'.join(p.relative_to(ROOT).parts)}" for p in folders}
    assert {p.parent for p in MODULES} <= folders, "every folder with modules is a package"


def test_version_is_the_same_in_pyproject() -> None:
    def version(path: str, name: str) -> str:
        return re.search(rf'^{name} = "([^"]+)"', (ROOT / path).read_text(), re.M)[1]  # type: ignore[index]

    assert version("pyproject.toml", "version") == version("runtime/version.py", "__version__")


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=lambda p: name_of(p.parent))
def test_package_files_only_describe(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert all(isinstance(node, ast.Expr) for node in body), "a docstring and nothing else"


def test_heavy_libraries_are_imported_by_few_modules() -> None:
    for library, homes in HEAVY.items():
        users = [p for p in SOURCES if any(dots == 0 and name.split(".")[0] == library for dots, name in imports(p))]
        assert [name_of(path) for path in users] == homes
