"""The command line: its output, and one line on stderr for bad input before anything is started."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams
from lockstep.launch.cli.main import main
from lockstep.launch.cluster import ray_executor
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.version import __version__

from checkpoints import rewrite_config
from small import COMMAND, SMALL, SMALL_FLAGS

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_ray(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts Ray."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_executor.ray, "init", refuse)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`lockstep` in this process: its exit status, stdout and stderr."""
    on_sigterm, log_level = signal.getsignal(signal.SIGTERM), logging.getLogger("lockstep").level

    def run(*arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lockstep", *arguments])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, on_sigterm)
    logging.getLogger("lockstep").setLevel(log_level)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a copy of the demo model, which the test damages."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def cut(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])


def test_json_lines_equal_api_results(command: Command) -> None:
    prompts = ["In the beginning", "Blessed is"]
    flags = ["--temperature=0.8", "--top-p=1", "--top-k=0", "--seed=5", "--max-tokens=8", "-n", "2", "--logprobs=1"]
    status, out, _ = command("generate", *SMALL_FLAGS, *flags, "--json", *[f"--prompt={prompt}" for prompt in prompts])
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=8, n=2, logprobs=1)
    with LLM(**SMALL) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    by_turn = {(line["prompt"], line["index"]): line for line in lines}
    assert len(lines) == len(by_turn) == 4
    for prompt, result in zip(prompts, expected, strict=True):
        for output in result.outputs:
            line = by_turn[prompt, output.index]
            assert (line["text"], line["token_ids"]) == (output.text, output.token_ids)
            assert line["finish_reason"] == output.finish_reason
            assert (line["prompt_tokens"], line["completion_tokens"]) == (len(result.prompt_token_ids), 8)
            assert [position["token_id"] for position in line["logprobs"]] == output.token_ids


def test_text_is_printed_in_prompt_order(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("And it came to pass\n")
    prompts = ["In the beginning", "And it came to pass"]
    flags = ["--temperature=0", "--max-tokens=8", "--ignore-eos", "--prompt", prompts[0]]
    status, out, err = command("generate", *SMALL_FLAGS, *flags, "--prompt-file", str(tmp_path / "prompt.txt"))
    with LLM(**SMALL) as llm:
        results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    assert status == 0
    assert out == "".join(f"--- {p}\n{r.outputs[0].text}\n" for p, r in zip(prompts, results, strict=True))
    assert "error" not in err


def test_prompt_from_pipe(command: Command) -> None:
    flags = ["--temperature=0", "--max-tokens=5", "--json"]
    _, by_flag, _ = command("generate", *SMALL_FLAGS, *flags, "--prompt=In the")
    _, by_pipe, _ = command("generate", *SMALL_FLAGS, *flags, stdin="In the\n")
    assert by_flag == by_pipe != ""


BAD_VALUES = {
    "no prompt": ([], "no prompt; give --prompt TEXT"),
    "empty prompt": (["--prompt="], "the prompt is empty"),
    "prompt too long": (["--prompt=" + "ark " * 3000], "shorten the prompt"),
    "prompt file missing": (["--prompt-file=/nowhere/x"], "/nowhere/x"),
    "prompt file is no text": ([f"--prompt-file={DEMO_MODEL}/model.safetensors"], "prompt file .*model.safetensors: "),
    "temperature": (["--prompt=x", "--temperature=9"], "temperature=9.0 must be between 0 and 2"),
    "top_p": (["--prompt=x", "--top-p=0"], r"top_p=0.0 must be in \(0, 1\]"),
    "not a number": (["--prompt=x", "--top-p=nan"], "top_p=nan must be"),
    "top_k": (["--prompt=x", "--top-k=-2"], "top_k=-2 must be at least -1"),
    "max_tokens": (["--prompt=x", "--max-tokens=0"], "max_tokens=0 must be at least 1"),
    "n": (["--prompt=x", "--n=0"], "n=0 must be between 1 and"),
    "logprobs without json": (["--prompt=x", "--logprobs=1"], "add --json"),
    "ranks": (["--prompt=x", "--tp=5"], "cannot be split over 5 ranks; use tensor_parallel_size=4 or less"),
    "no ranks": (["--prompt=x", "--tp=0"], "tensor_parallel_size=0 must be an integer >= 1"),
    "log level": (["--prompt=x", "--log-level=loud"], "'loud' is not one of debug, info, warning, error"),
    "context": (["--prompt=x", "--max-model-len=999999"], "max_model_len=999999 is beyond the 2048 positions"),
    "model as an option": (["--model=x", "--prompt=x"], "the model is the first argument"),
    "model folder": (["/nowhere/model", "--prompt=x"], "model folder /nowhere/model does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_value_is_one_line(command: Command, arguments: list[str], message: str) -> None:
    flags = [] if any(a.startswith("--max-model-len") for a in arguments) else SMALL_FLAGS
    status, out, err = command("generate", "--log-level=error", *flags, *arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", err)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "header cut": (lambda folder: cut(folder, 100), "model.safetensors is corrupt or incomplete"),
    "data cut": (lambda folder: cut(folder, -1000), "model.safetensors is corrupt or incomplete"),
    "empty weights": (lambda folder: cut(folder, 0), "model.safetensors is corrupt or incomplete"),
    "shape": (lambda folder: rewrite_config(folder, intermediate_size=640), r"misshapen: .*\[\d+, 128\] instead of"),
    "architecture": (
        lambda folder: rewrite_config(folder, architectures=["Mamba"]),
        "Mamba .*supported ones are Llama",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_bad_checkpoint_is_one_line(
    command: Command, checkpoint: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(checkpoint)
    status, out, err = command("generate", str(checkpoint), "--log-level=error", *SMALL_FLAGS, "--prompt=x")
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--kv-layout=best"], "'best' is not one of 'layer-first', 'page-first'"),
        (["--dtype=int8"], "'int8' is not one of 'auto', 'float32', 'float16', 'bfloat16'"),
        (["--max-tokens=many"], "Invalid value for '--max-tokens'"),
        (["--no-such-flag"], "No such option: --no-such-flag"),
    ],
)
def test_bad_flag_names_alternatives(command: Command, arguments: list[str], message: str) -> None:
    status, out, err = command("generate", "--prompt=x", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_unreachable_ray_address_is_reported_in_seconds(command: Command) -> None:
    """Ray itself, which would try for two minutes, is not called."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but not listening
        status, _, err = command("generate", "--prompt=x", "--log-level=error", f"--ray-address={address}")
    assert status == 1
    assert re.fullmatch(rf"error: no Ray cluster at {address}: [^\n]*\n", err)


@pytest.mark.process
def test_command_in_its_own_process() -> None:
    """Imports print nothing: stderr has the error's line alone."""
    version = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=60)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"lockstep {__version__}\n", "")
    bad = [*COMMAND, "generate", "/nowhere/model", "--prompt=x"]
    refused = subprocess.run(bad, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.fullmatch(r"error: model folder [^\n]*\n", refused.stderr)


@pytest.mark.process
def test_help_imports_no_slow_library() -> None:
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); " + COMMAND[-1]
    ended = subprocess.run([*COMMAND[:-1], report, "--help"], capture_output=True, text=True, timeout=60)
    assert "generate" in ended.stdout
    assert {"torch", "transformers", "ray", "fastapi", "uvicorn", "pydantic"}.isdisjoint(ended.stderr.split())


def test_structured_output_flags(command: Command, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["went up", "came down"]}')
    arguments = ("generate", *SMALL_FLAGS, "--prompt", "And the king", "--seed=1", "--n=4")
    for schema in (str(tmp_path / "schema.json"), '{"enum": ["went up", "came down"]}'):
        code, out, _ = command(*arguments, "--json", "--json-schema", schema)
        assert code == 0
        assert {json.loads(line)["text"] for line in out.splitlines()} <= {'"went up"', '"came down"'}
    code, out, _ = command(*arguments, "--regex", "[a-c]{3}")
    assert [bool(re.fullmatch("[a-c]{3}", line)) for line in out.splitlines()[1::2]] == [True] * 4
    assert command(*arguments, "--choice=went", "--choice=came")[1].splitlines()[1] in ("went", "came")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regex=("], "error: structured_outputs=regex cannot be used: .*unclosed group"),
        (["--regex=a", "--choice=b"], "error: structured_outputs=has regex and choice"),
        (["--json-schema=no such file"], "error: JSON schema no such file"),
        (["--json-schema={"], "error: structured_outputs=json cannot be used"),
        (["--regex=a", "--ignore-eos"], "error: ignore_eos=True does not go with structured_outputs"),
    ],
)
def test_bad_structured_output_flags(command: Command, flags: list[str], message: str) -> None:
    code, out, err = command("generate", *SMALL_FLAGS, "--prompt=a", *flags)
    assert (code, out) == (2, "")
    assert re.match(message, err.splitlines()[-1])
