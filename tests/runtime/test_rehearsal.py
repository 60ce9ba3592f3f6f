"""The rehearsal before a rank is ready launches every op, and every kernel, that requests launch later.

Ops are recorded with the dtypes of their tensors, which select the instances of kernels. With the emulator the
instances themselves are recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lockstep.comm.base import SingleRank
from lockstep.kernels import native, ops
from lockstep.runtime import startup
from lockstep.runtime.config import Config
from lockstep.runtime.engine import Engine
from lockstep.runtime.limits import Limits
from lockstep.runtime.model.model_config import ModelConfig
from lockstep.runtime.request import Request
from lockstep.runtime.runner.kernel_compilation import compile_decode_kernels
from lockstep.runtime.runner.rank_memory import RankMemory
from lockstep.runtime.runner.runner import Runner
from lockstep.runtime.scheduler.scheduler import Scheduler
from lockstep.runtime.startup import LoadedRank, plan_limits

import emulator
from checkpoints import FAMILIES, tiny_checkpoint
from engines import request
from replayed_graphs import use_replayed_graphs

PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 100, "top_p": 0.9},
    {"logprobs": 3},
    {"prompt_logprobs": 2},
    {"repetition_penalty": 1.2, "temperature": 1.0},
    {"logit_bias": {5: 1.0}, "temperature": 1.0, "top_k": 5},
    {"min_tokens": 2, "temperature": 1.0, "top_p": 0.5},
]
ROWS = 9  # of the largest decode step
Launch = tuple[Any, ...]


class RecordedOps:
    """The ops of a module, which add their names and the dtypes of their tensors to `launches`."""

    def __init__(self, module: Any, launches: set[Launch]) -> None:
        self._module, self._launches = module, launches

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            values = [*arguments, *options.values()]
            self._launches.add((name, *(value.dtype for value in values if isinstance(value, Tensor))))
            return getattr(self._module, name)(*arguments, **options)

        return run


def start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    eager: bool,
    compile_kernels: Callable[..., object] = lambda *_: None,
) -> tuple[Limits, Runner]:
    """Start a rank as on a GPU, with its rehearsal, whose measurements are left out."""
    use_replayed_graphs(monkeypatch)
    for name, stub in (
        ("read_gpu", lambda *_: (0, 0)),
        ("other_processes", lambda _: []),
        ("compile_decode_kernels", compile_kernels),
    ):
        monkeypatch.setattr(startup, name, stub)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    asked = Config(
        model=str(folder), device="cpu", dtype="bfloat16", num_pages=256, page_size=16, max_num_seqs=ROWS,
        max_num_batched_tokens=64, max_model_len=96, enforce_eager=eager,
    )  # fmt: skip
    model = ModelConfig.from_folder(folder)
    config = asked.resolved(model, cuda=False)
    loaded = LoadedRank(config, model, folder, SingleRank())
    loaded._rehearse()
    limits = plan_limits(asked, config, model, loaded.plan_memory())
    return limits, loaded.allocate(limits)


def serve(limits: Limits, runner: Runner) -> None:
    """Run requests of all kinds, alone and together, with prompts of many lengths."""
    engine = Engine(Scheduler(limits), runner, lambda plan: None, overlap=False)
    rng = np.random.default_rng(0)

    def new_request(uid: int, length: int) -> Request:
        return request(uid, rng.integers(3, 131, length).tolist(), max_tokens=3, **PARAMS[uid % len(PARAMS)])

    alone = [[new_request(uid, 1 + 5 * uid)] for uid in range(len(PARAMS))]
    together = [[new_request(100 * count + i, 3 + i) for i in range(count)] for count in (2, 3, 5, ROWS)]
    for requests in (*alone, *together):
        engine.add(requests)
        while engine.has_work:
            engine.step()


def check_requests_launch_nothing_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch, launches: set[Launch], *, eager: bool
) -> None:
    """Start a rank and serve requests; `launches` gets what is launched meanwhile."""
    with torch.inference_mode():
        limits, runner = start(folder, monkeypatch, eager=eager)
        rehearsed = set(launches)
        assert len(rehearsed) > 10
        serve(limits, runner)
    assert launches == rehearsed


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name == "LlamaForCausalLM" else pytest.mark.nightly) for name in FAMILIES],
)
def test_requests_launch_only_ops_that_were_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, eager: bool
) -> None:
    tiny_checkpoint(tmp_path, architecture, max_position_embeddings=128)
    launches: set[Launch] = set()
    monkeypatch.setattr(ops, "reference", RecordedOps(ops.reference, launches))
    check_requests_launch_nothing_new(tmp_path, monkeypatch, launches, eager=eager)


@pytest.mark.nightly
@pytest.mark.emulator
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("eager", [False, True])
def test_requests_launch_only_kernels_that_were_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, eager: bool
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    tiny_checkpoint(tmp_path, architecture, max_position_embeddings=128, **sizes)
    launches: set[Launch] = set()

    def recorded(source: str, name: str, **options: Any) -> Callable[..., None]:
        launches.add((source, name))
        return emulator._kernel(source, name, **options)

    use_emulator(monkeypatch, recorded)
    check_requests_launch_nothing_new(tmp_path, monkeypatch, launches, eager=eager)


def use_emulator(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Any]) -> None:
    """Let the ops launch kernels in the emulator, which they get from `kernel`."""
    kernels = emulator.emulated()
    for function in vars(kernels).values():
        if callable(function) and "kernel" in getattr(function, "__globals__", {}):
            monkeypatch.setitem(function.__globals__, "kernel", kernel)
    monkeypatch.setattr(ops, "reference", kernels)


@pytest.mark.nightly
@pytest.mark.emulator
def test_rehearsal_compiles_only_kernels_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of decode steps, of GEMMs of tens of rows and of sampling were named before, for threads to compile."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    tiny_checkpoint(tmp_path, "LlamaForCausalLM", max_position_embeddings=128, **sizes)
    named, launched = set[Launch](), set[Launch]()

    @contextmanager
    def requested_kernels() -> Iterator[set[Launch]]:
        with monkeypatch.context() as naming:
            use_emulator(naming, lambda source, name, **options: lambda *_: named.add((source, name)))
            yield named

    def recorded(source: str, name: str, **options: Any) -> Callable[..., None]:
        launched.add((source, name))
        return emulator._kernel(source, name, **options)

    launches: Any = ModuleType("kernel_launch")
    launches.requested_kernels, launches.compile_kernels = requested_kernels, lambda *_: None
    monkeypatch.setitem(sys.modules, "lockstep.kernels.cuda.kernel_launch", launches)
    use_emulator(monkeypatch, recorded)
    with torch.inference_mode():
        start(tmp_path, monkeypatch, eager=False, compile_kernels=compile_decode_kernels)
    prompts = "rms_norm<bf16, 8, 1>", "rotate_and_store<bf16, bf16, 1, 1>"
    assert {name for _, name in launched - named} == {*prompts}
    assert named < launched


@pytest.mark.parametrize("eager", [False, True])
def test_start_continues_if_steps_cannot_be_captured_ahead(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eager: bool
) -> None:
    def fail(memory: RankMemory, max_rows: int) -> None:
        assert max_rows == ROWS
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with torch.inference_mode():
        _, runner = start(llama_folder, monkeypatch, eager=eager, compile_kernels=fail)
    assert (runner.graphs is None) == eager
    warning = "the kernels are compiled one after the other: operation not permitted"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warning] * (not eager)


def test_prefix_comparison_is_compiled_before_the_first_request(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(startup, "prefix_compare", lambda: compiled.append("now"))
    limits = {}
    for caching in (True, False):
        asked = Config(model=str(llama_folder), device="cpu", num_pages=64, enable_prefix_caching=caching)
        model = ModelConfig.from_folder(llama_folder)
        config = asked.resolved(model, cuda=False)
        loaded = LoadedRank(config, model, llama_folder, SingleRank())
        limits[caching] = plan_limits(asked, config, model, loaded.plan_memory())
        loaded.allocate(limits[caching])
        assert compiled == ["now"]
    assert native.prefix_compare() is not None
