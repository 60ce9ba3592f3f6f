"""Kernels that are requested first and compiled later, in threads: with a stand-in for CuPy, and on a GPU."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from lockstep.kernels import cuda, ops

NORM = ("elementwise.cu", "rms_norm<bf16, 8, 1>")


class CompiledModule:
    """A stand-in for cupy.RawModule, which keeps the names of what it compiles and the threads that did."""

    compiled: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...] | None) -> None:
        self.names = name_expressions

    def get_function(self, name: str) -> SimpleNamespace:
        CompiledModule.compiled.append((name, threading.get_ident()))
        return SimpleNamespace(shared_size_bytes=0, kernel=SimpleNamespace(ptr=0))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module kernel_launch, imported once more without CuPy."""
    stubs: dict[str, Any] = {name: ModuleType(name) for name in ("cupy", "cuda", "cuda.bindings")}
    stubs["cupy"].RawModule = CompiledModule
    stubs["cupy"].cuda = SimpleNamespace(compiler=SimpleNamespace(CompileException=ValueError))
    stubs["cuda.bindings"].driver = mock.MagicMock()
    monkeypatch.setattr(cuda, "kernel_launch", None, raising=False)  # the import sets it, and the end restores it
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(CompiledModule, "compiled", [])
    with mock.patch.dict(sys.modules, stubs):
        sys.modules.pop("lockstep.kernels.cuda.kernel_launch", None)
        yield importlib.import_module("lockstep.kernels.cuda.kernel_launch")


def test_requested_kernels_are_compiled_later_once_and_in_other_threads(launches: Any) -> None:
    launches.kernel(NORM[0], "begin_decode")
    with launches.requested_kernels() as instances:
        launches.kernel(*NORM)((1, 1), 32)
        launches.kernel(*NORM, shared_bytes=64)((1, 1), 32)
        launches.kernel(NORM[0], "begin_decode")
    assert instances == {(*NORM, "")}
    assert [name for name, _ in CompiledModule.compiled] == ["begin_decode"]
    launches.compile_kernels(instances, torch.device("cuda"))
    assert launches.kernel(*NORM) is not launches.kernel(*NORM, shared_bytes=64)
    launches.kernel(NORM[0], "begin_decode")
    assert [name for name, _ in CompiledModule.compiled] == ["begin_decode", NORM[1]]
    assert CompiledModule.compiled[1][1] != threading.get_ident()


@pytest.mark.parametrize(("rank", "share"), [(0, "ACE"), (1, "BD")])
def test_ranks_begin_with_different_kernels(launches: Any, rank: int, share: str) -> None:
    launches.compile_kernels([(NORM[0], name, "") for name in "ABCDE"], torch.device("cuda"), rank, 2)
    compiled = [name for name, _ in CompiledModule.compiled]
    assert sorted(compiled[: len(share)]) == [*share]
    assert sorted(compiled) == [*"ABCDE"]


def test_kernels_are_launched_again_after_an_error_in_the_block(launches: Any) -> None:
    def fail() -> None:
        with launches.requested_kernels():
            launches.kernel(*NORM)
            raise RuntimeError("no capture")

    with pytest.raises(RuntimeError, match="no capture"):
        fail()
    launches.kernel(*NORM)
    assert [name for name, _ in CompiledModule.compiled] == [NORM[1]]


def test_other_threads_launch_in_the_meantime(launches: Any) -> None:
    launched = launches.driver.cuLaunchKernelEx
    launched.return_value = (launches.driver.CUresult.CUDA_SUCCESS,)
    launches._current_stream = lambda: 0

    def launch() -> None:
        launches.kernel(*NORM)((1, 1), 32)

    with launches.requested_kernels():
        launch()
        assert not launched.called
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()
    assert launched.call_count == 1
    launch()
    assert launched.call_count == 2


def test_zeros_of_a_graph_that_is_never_replayed_are_not_kept(launches: Any) -> None:
    device = torch.device("cpu")
    with launches.requested_kernels():
        never_filled = launches.kept_zeros("counter", 3, device)
    kept = launches.kept_zeros("counter", 3, device)
    assert kept is not never_filled
    assert kept.tolist() == [0, 0, 0]
    with launches.requested_kernels():
        assert launches.kept_zeros("counter", 3, device) is kept
    assert launches.kept_zeros("other", 1, device) is not kept


@pytest.mark.gpu
def test_kernel_of_a_graph_that_was_never_replayed_computes() -> None:
    from lockstep.kernels.cuda import kernel_launch

    kernel_launch._compile.cache_clear()
    kernel_launch.kernel.cache_clear()
    x, weight = torch.randn(3, 1000, device="cuda"), torch.randn(1000, device="cuda")
    never_replayed = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
    with kernel_launch.requested_kernels() as instances, never_replayed:
        ops.rms_norm(x.clone(), weight, 1e-5)  # torch warns of an empty graph
    assert len(instances) == 1
    kernel_launch.compile_kernels(instances, x.device)
    compiled = kernel_launch._compile.cache_info().misses
    expected = torch.nn.functional.rms_norm(x, (1000,), weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)
    assert kernel_launch._compile.cache_info().misses == compiled
