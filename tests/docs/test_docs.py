"""The documents against the repository: links, paths, commands, figures and generated pages."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    ROOT / "launch/demo/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "scripts/results").glob("*.md")),
]
FOLDERS = ("comm", "docs", "examples", "kernels", "launch", "runtime", "scripts", "tests")
MAX_README_LINES, MAX_LINE, MAX_SENTENCE = 150, 120, 25  # lines, characters, words
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the code blocks of a language."""
    for _, name, code in FENCE.findall(page.read_text()):
        if name == language:
            yield code


def prose(page: Path) -> str:
    """Return the page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{target} has no such heading"


@by_page
def test_paths_exist(page: Path) -> None:
    text = page.read_text() if page.parent.name != "results" else prose(page)
    for path in re.findall(rf"(?<![\w/.<])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)", text):
        assert any(ROOT.glob(path)), f"{path} does not exist"


@by_page
def test_classes_and_their_members_exist(page: Path) -> None:
    if page.name == "log.md" or page.parent.name == "results":  # what ran at an older commit
        return
    source = "\n".join(path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    for name, member in re.findall(r"`([A-Z]+[a-z][A-Za-z]*)(?:\.(\w+))?(?![-\w])", prose(page)):
        assert re.search(rf"\b{name}\b", source), f"there is no {name}"
        body = re.search(rf"^class {name}\b.*?(?=^\S)", source, re.M | re.S)
        assert not member or (body and re.search(rf"\b{member}\b", body[0])), f"{name} has no {member}"


@by_page
def test_lines_are_short(page: Path) -> None:
    generated = page.name == "flags.md"
    for number, line in enumerate(page.read_text().splitlines(), 1):
        is_data = line.lstrip().startswith(("|", "{"))  # a table, or a JSON line of a result
        assert generated or is_data or len(line) <= MAX_LINE, f"line {number} has {len(line)} characters"


@by_page
def test_sentences_are_short(page: Path) -> None:
    if page.name == "flags.md":  # help texts
        return
    lines = [line for line in prose(page).splitlines() if not line.lstrip().startswith("|")]
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |#))", "\n".join(lines)):
        if paragraph.startswith(("    ", "{")):  # code, or JSON
            continue
        text = re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "]", " ".join(paragraph.split())))
        for sentence in re.split(r"(?<=[.!?:;])\s+", text):
            assert len(sentence.split()) <= MAX_SENTENCE, sentence


@by_page
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)


def test_readme_fits_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def lockstep_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield each `lockstep ...` command of the pages with its flags."""
    for page in PAGES:
        if page.parent.name == "results":  # what ran at an older commit
            continue
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                code = line.split("  #")[0].split(" # ")[0]
                command = re.search(r"\blockstep ((?:bench )?[a-z]+(?:-[a-z]+)*)\b(.*)", code)
                if command is not None:
                    yield command[1], re.findall(r"(?<=\s)--?[a-z][\w-]*", command[2])


def test_commands_have_the_flags_that_the_pages_use() -> None:
    generate_flags = runpy.run_path(str(ROOT / "scripts/generate_flags.py"))
    known = {
        name: {flag for param in params for flag in re.findall(r"`([^`]+)`", generate_flags["_names"](param))}
        for name, params in generate_flags["commands"](generate_flags["app"])
    }
    used = list(lockstep_commands())
    assert len(used) > 10
    for command, flags in used:
        assert command in known, f"lockstep {command} is no command"
        unknown = set(flags) - known[command]
        assert not unknown, f"lockstep {command} has no {', '.join(sorted(unknown))}"


def test_scripts_that_the_pages_run_exist() -> None:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for script in re.findall(r"(?:bash|python3?) ([\w/]+\.(?:sh|py))", block):
                assert (ROOT / script).is_file(), f"{page.name}: {script} does not exist"


def test_extras_that_the_pages_install_exist() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for extras in re.findall(r"'\.\[([\w,]+)\]'", page.read_text()):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", pyproject, re.M), f"{page.name}: there is no extra {extra}"


def test_messages_that_the_troubleshooting_page_quotes_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message may go over several lines
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quotes = [quote for row in re.findall(r"^\| (.*?) \|", page, re.M) for quote in re.findall(r"`(.*?)`", row)]
    assert len(quotes) > 20
    for quote in quotes:
        for part in re.split(r"\.\.\.|\bN\b|\d[\d.]*|\bthis machine\b", quote):
            assert part.strip() in source, f"no message has {part.strip()!r}"


def test_flags_page_is_current() -> None:
    generate_flags = runpy.run_path(str(ROOT / "scripts/generate_flags.py"))
    assert generate_flags["text"]() == generate_flags["OUTPUT"].read_text(), "run python scripts/generate_flags.py"


def test_the_models_of_the_page_are_the_supported_ones() -> None:
    from lockstep.runtime.model.families import ARCHITECTURES, TEXT_PARTS

    assert set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/models.md").read_text(), re.M)) == {
        *ARCHITECTURES,
        *TEXT_PARTS,
    }


def test_the_routes_of_the_serving_page_are_those_of_the_server() -> None:
    source = (ROOT / "launch/server/app.py").read_text()
    listed = set(re.findall(r"`(?:GET|POST) (/[\w/]*)", (ROOT / "docs/serving.md").read_text())) - {"/"}
    assert listed >= set(re.findall(r'"(/(?:v1/)?[a-z_/]+)"', source)) - {"/stats"}


def test_architecture_lists_the_folders_in_the_order_of_imports() -> None:
    order = runpy.run_path(str(ROOT / "tests/test_tree.py"))["ROOMS"]  # from the bottom; "folder: modules" is its base
    expected = [re.sub(r"^(.*): .*", r"\1 (base)", room) for room in reversed(order)]
    page = (ROOT / "docs/architecture.md").read_text()
    listed = [name.replace("`", "") for name in re.findall(r"^\| (`[\w/]+`(?: \(base\))?) \|", page, re.M)]
    assert listed == [*expected, "kernels/csrc"]


def test_the_kernels_page_lists_every_op_with_its_launch_and_source() -> None:
    source = "".join((ROOT / f"kernels/{name}.py").read_text() for name in ("ops", "state_ops", "expert_ops"))
    launches = {name: module for module, name in re.findall(r'^@op\("(\w+)"\)\ndef (\w+)', source, re.M)}
    listed: dict[str, str] = {}
    for ops, launch, sources in re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|.*\| ([^|]*) \| ([^|]*) \|$", (ROOT / "docs/kernels.md").read_text(), re.M
    ):
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", ops), launch.strip("`").removesuffix(".py"))
        for file in re.findall(r"`([\w.]+)`", sources):
            assert (ROOT / "kernels/csrc" / file).is_file(), f"there is no {file}"
    assert listed == launches | {"common_prefix_length": "-"}


def test_contributing_names_every_marker() -> None:
    listed = re.search(r"^markers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    markers = set(re.findall(r'^    "(\w+)', listed[1], re.M)) - {"xdist_group"}
    page = (ROOT / "docs/contributing.md").read_text()
    assert not {marker for marker in markers if f"`{marker}`" not in page}


def test_every_result_is_in_the_index() -> None:
    index = (ROOT / "docs/benchmarks.md").read_text()
    for page in PAGES:
        if page.parent.name == "results":
            assert f"scripts/results/{page.name}" in index


def test_the_readmes_figures_are_those_of_the_results() -> None:
    """Compare each cell of the README's table with the tables that the plot is drawn from."""
    plot = runpy.run_path(str(ROOT / "scripts/plot_benchmarks.py"))
    one_gpu = list(plot["table"](plot["RESULTS"] / "decode_h200_202611.md", "model"))
    several = list(plot["table"](plot["RESULTS"] / "tp4_h200x4_202611.md", "model"))
    measured = {(row["model"], row.get("TP", "1"), row[""]): cell(row) for row in [*one_gpu, *several]}
    rows = list(plot["table"](ROOT / "README.md", "model"))
    assert len(rows) == 7
    for row in rows:
        for engine in ("lockstep", "vLLM 0.22", "mini-sglang"):
            shown = row[engine].replace("*", "")
            assert shown == measured.get((row["model"], row["TP"], engine), ""), (row["model"], engine)


def cell(row: dict[str, str]) -> str:
    """Return the figures of a row as the README shows them."""
    latencies = " / ".join(f"{float(row[f'batch {size}']) + 1e-9:.2f}" for size in (1, 8, 64))
    return f"{latencies}, {row['nano, tok/s']}"


def test_the_plot_is_drawn_from_the_results() -> None:
    plot = runpy.run_path(str(ROOT / "scripts/plot_benchmarks.py"))
    for figures in (plot["one_gpu"](), plot["tensor_parallel"]()):
        for groups in figures.values():
            for group, engines in groups.items():
                assert {"lockstep", "vLLM 0.22"} <= set(engines), group
    assert (ROOT / "docs/benchmarks.svg").is_file()
