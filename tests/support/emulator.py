"""kernels/cuda.py with its kernels on a CPU: compiled by g++ against emulator.hpp, launched as on a very small GPU.

What our kernels say in assembly is taken out of their sources and stands in emulator.hpp; all else is their own text.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from lockstep.kernels import ops

HEADER = Path(__file__).with_name("emulator.hpp")
MULTIPROCESSORS = 3
SHARED_BYTES = 227 * 1024
IN_ASSEMBLY = "multiply|stream|transpose|copy_later|copy_async|commit_copies|wait_copies|load_matrices"
Launch = Callable[..., None]


@functools.cache
def emulated() -> ModuleType:
    """The module, loaded once more beside the one for GPUs."""
    stubs = {name: ModuleType(name) for name in ("cupy", "cuda", "cuda.bindings", "cuda.bindings.driver")}
    stubs["cuda.bindings"].driver = stubs["cuda.bindings.driver"]  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("lockstep.kernels.emulated", Path(ops.__file__).with_name("cuda.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    with mock.patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    names: dict[str, Any] = {"_kernel": _kernel, "_multiprocessors": lambda device: MULTIPROCESSORS}
    for name, value in names.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    return module


def _kernel(source: str, name: str, *, shared_bytes: int = 0, early: bool = False) -> Launch:
    """As cuda.py's: one instance of a kernel, called with grid, threads and arguments."""
    library = _compiled(emulated().source_text(source), name)

    def launch(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        assert 0 < threads <= 1024
        assert threads % 32 == 0
        assert min(grid) > 0
        assert shared_bytes <= SHARED_BYTES
        addresses = [np.int64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        passed = (ctypes.c_char_p * len(addresses))(*(a.tobytes() for a in addresses))
        fault = library.launch(*grid, threads, shared_bytes, passed)
        assert fault is None, f"{name}: {fault.decode()}"

    return launch


@functools.cache
def _compiled(text: str, name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cpp").write_text(
            f'#include "emulator.hpp"\n{in_cpp(text)}\n'
            'extern "C" const char* launch(int width, int height, int threads, int shared_bytes, void** given) {\n'
            f"    auto body = [](void** of) {{ emulator::call(&{name}, of); }};\n"
            "    return emulator::launch(width, height, threads, shared_bytes, body, given);\n}\n"
        )
        _compile("-I", _header().name, "-shared", "kernel.cpp", "-o", "kernel.so", folder=folder)
        library = ctypes.CDLL(f"{folder}/kernel.so")
    library.launch.restype = ctypes.c_char_p
    return library


@functools.cache
def _header() -> tempfile.TemporaryDirectory[str]:
    """A folder with the header, precompiled: reading it takes longer than a kernel does."""
    folder = tempfile.TemporaryDirectory()
    shutil.copy(HEADER, folder.name)
    _compile("-x", "c++-header", "emulator.hpp", folder=folder.name)
    return folder


def _compile(*arguments: str, folder: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-fPIC", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def in_cpp(text: str) -> str:
    """A source without assembly, and with shared memory as C++ can declare it."""
    text = re.sub(r"#include <cuda_\w+\.h>|#pragma \w+.*", "", text)
    text = re.sub(r"#define MULTIPLY_ADD.*?\n    }\n(MULTIPLY_ADD\(.*?\)\n)+", "", text, flags=re.DOTALL)
    text = re.sub(
        rf"(template <int N> )?__device__ __forceinline__ [\w ]+ ({IN_ASSEMBLY})\(.*?\n?}}\n", "", text, flags=re.DOTALL
    )
    text = text.replace('asm volatile("cp.async.wait_all;" ::: "memory");', "wait_all_copies();")
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+?) (\w+)\[\];", r"\1* \2 = (\1*)emulator::shared;", text
    )
    return re.sub(r"__shared__ alignas\((\d+)\)", r"alignas(\1) __shared__", text)
