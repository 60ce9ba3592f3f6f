"""kernels/cuda/ with its kernels on a CPU: compiled by g++ with emulator.hpp, launched as on a very small GPU.

Functions in assembly are removed from the sources; emulator.hpp has them in C++. All other code is compiled unchanged.
Compiled kernels are cached by source, flags and header, like all native code.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lockstep.kernels import native, ops
from lockstep.kernels.cuda.launch_parameters import LaunchParameters

HEADER = Path(__file__).with_name("emulator.hpp")
SCHEDULER = HEADER.with_suffix(".cpp")  # of the threads that emulator.hpp declares
PACKAGE = "lockstep.kernels.emulated"
FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-U_FORTIFY_SOURCE")  # it refuses jumps between stacks
MULTIPROCESSORS = 3
SHARED_BYTES = 227 * 1024
IN_ASSEMBLY = (
    "stream|load_written|stream_half|stream_word|stream_float|exp2_of|approximate_inverse|transpose|copy_async|copy_word_async|commit_copies|wait_copies|wait_all_copies"
    "|load_matrices|load_transposed_matrices"
    "|store_release|load_acquire|store_relaxed|load_relaxed|now_ns|multiply_async|begin_multiply|end_multiply|init_barrier"
    "|publish_barriers|arrive|arrive_expecting|wait_for_phase|copy_box|copy_bytes|prefetch_line|prefetch_map"
    "|sync_threads|sync_cluster|load_of_block|place_in_cluster|cluster_index"
    "|arrive_at_cluster|arrive_without_memory|wait_for_cluster|commit_multiply|wait_multiply|wait_multiply_but_last|publish_copies|store_float_of_block"
    "|compute_later|send_to_block|wait_for_blocks|copy_parts|is_elected|store_of_block|release_registers|take_registers"
)
Launch = Callable[..., None]


@functools.cache
def emulated() -> SimpleNamespace:
    """Return the modules of kernels/cuda/ in one namespace, imported once more beside those for GPUs."""
    folder = Path(ops.__file__).with_name("cuda")
    stubs = {name: ModuleType(name) for name in ("cupy", "cuda", "cuda.bindings", "cuda.bindings.driver")}
    stubs["cuda.bindings"].driver = stubs["cuda.bindings.driver"]  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    stubs[PACKAGE] = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs):
        launches = importlib.import_module(f"{PACKAGE}.kernel_launch")
        substitutes: dict[str, Any] = {
            "kernel": _kernel,
            "num_multiprocessors": lambda device: MULTIPROCESSORS,
            "max_shared_bytes": lambda device: SHARED_BYTES,
            "compute_capability": lambda device: (8, 0),
            "tile_map": _tile_map,
            "part_map": _part_map,
        }
        for name, substitute in substitutes.items():
            assert hasattr(launches, name)
            setattr(launches, name, substitute)
        names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def launches(module: str, device: str) -> SimpleNamespace:
    """Return what a module of kernels/cuda has, for "cpu" with the emulator's kernels."""
    if device == "cpu":
        return emulated()
    return SimpleNamespace(**vars(importlib.import_module(f"lockstep.kernels.cuda.{module}")))


def put_fault(monkeypatch: pytest.MonkeyPatch, source: str, right: str, wrong: str) -> None:
    """Replace `right`, which a kernel source has once, by `wrong`, for a test that must fail then."""
    original = native.source_text
    assert original(source).count(right) == 1
    faulty = original(source).replace(right, wrong)
    monkeypatch.setattr(native, "source_text", lambda name: faulty if name == source else original(name))


def _kernel(
    source: str, name: str, *, shared_bytes: int = 0, early: bool = False, cluster: int = 1, architecture: str = ""
) -> Launch:
    """Stand for `kernel` of kernel_launch.py: return one instance, called with grid, threads and arguments."""
    library = _compiled(native.source_text(source), name)
    parameters = LaunchParameters()

    def launch(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        assert 0 < threads <= 1024
        assert threads % 32 == 0
        assert min(grid) > 0
        assert shared_bytes <= SHARED_BYTES
        assert grid[0] % cluster == 0
        values = ctypes.c_void_p(parameters.address_of(arguments))
        fault = library.launch(*grid, threads, shared_bytes, cluster, values)
        assert fault is None, f"{name}: {fault.decode()}"

    return launch


@dataclass(frozen=True)
class EmulatedTileMap:
    """A stand-in for driver.CUtensorMap: the bytes of a TileMap that begin with an EmulatedMap."""

    words: np.ndarray

    def getPtr(self) -> int:
        return int(self.words.ctypes.data)


def _tile_map(matrix: torch.Tensor, box_rows: int) -> EmulatedTileMap:
    """Stand for `tile_map` of kernel_launch.py."""
    rows, columns = matrix.shape
    words = matrix.data_ptr(), rows, columns * matrix.element_size(), box_rows, *[0] * 12
    return EmulatedTileMap(np.array(words))


def _part_map(matrix: torch.Tensor, box_rows: int, halves: int, parts: int) -> EmulatedTileMap:
    """Stand for `part_map` of kernel_launch.py."""
    rows, columns = matrix.shape
    words = matrix.data_ptr(), rows // halves, columns * matrix.element_size(), box_rows // halves, halves, parts
    return EmulatedTileMap(np.array([*words, *[0] * 10]))


@functools.cache
def _compiled(text: str, name: str) -> ctypes.CDLL:
    program = (
        f'#include "emulator.hpp"\n{in_cpp(text)}\n'
        'extern "C" const char* launch(int width, int height, int threads, int shared_bytes, int cluster,'
        " void** arguments) {\n"
        f"    auto body = [](void** values) {{ emulator::call(&{name}, values); }};\n"
        "    return emulator::launch(width, height, threads, shared_bytes, cluster, body, arguments);\n}\n"
    )
    library = compiled(program)
    library.launch.restype = ctypes.c_char_p
    return library


def compiled(program: str) -> ctypes.CDLL:
    """Return a program that includes emulator.hpp as a library."""
    _load_scheduler()
    return ctypes.CDLL(str(_library(program)))


@functools.cache
def _load_scheduler() -> None:
    """Load the functions of emulator.cpp, which the compiled programs call."""
    ctypes.CDLL(str(_library(SCHEDULER.read_text())), mode=ctypes.RTLD_GLOBAL)


def _library(program: str) -> Path:
    return native.build_library("emulated", program, (*FLAGS, "-I", str(_header_folder())))


@functools.cache
def _header_folder() -> Path:
    """Return a folder with the header, precompiled: reading it takes longer than a kernel does."""
    text = HEADER.read_text()
    command = [native.cpp_compiler("the emulator"), *FLAGS, "-fPIC", "-x", "c++-header"]
    folder = native.cache_dir() / f"emulator-{hashlib.sha256(repr((text, command)).encode()).hexdigest()[:16]}"
    precompiled = folder / "emulator.hpp.gch"
    if not precompiled.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HEADER, folder)
        native.compile_file(command, text, precompiled)
    return folder


def in_cpp(text: str) -> str:
    """Return a source without assembly, and with shared memory as C++ can declare it."""
    text = re.sub(r"#include <cuda_\w+\.h>|#pragma \w+.*", "", text)
    for macro in ("MULTIPLY_ASYNC", "MULTIPLY", "SCALE_PAIR", "LOAD_RELAXED"):
        text = re.sub(rf"#define {macro}.*?\n    }}\n({macro}\(.*?\)\n)+", "", text, flags=re.DOTALL)
    text = re.sub(r"#if __CUDA_ARCH__ >= 890\n.*?#endif\n", "", text, flags=re.DOTALL)
    text = re.sub(rf"(template <int N> )?DEVICE [\w ]+ ({IN_ASSEMBLY})\(.*?\n?}}\n", "", text, flags=re.DOTALL)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];",
        r"\1* \2 = (\1*)emulator::block_memory();",
        text,
    )
    return re.sub(r"__shared__ alignas\((\d+)\)", r"alignas(\1) __shared__", text)
