"""Compiles what is shipped as source: `radix.cpp` with the system's C++ compiler, on first use, into a cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")


class CompileError(RuntimeError):
    """A source did not compile; the message is the compiler's own log."""


@functools.cache
def radix_compare() -> Callable[[np.ndarray, np.ndarray], int] | None:
    """`common_prefix_length` of radix.cpp, or None (logged once) where it cannot be built: NumPy then serves."""
    try:
        function = ctypes.CDLL(str(build_cpp("radix.cpp"))).common_prefix_length
    except (CompileError, OSError) as error:
        log.warning("prefix cache compares tokens with NumPy, about 5 us a comparison instead of 1 us: %s", error)
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_int64

    def compare(a: np.ndarray, b: np.ndarray) -> int:
        return int(function(a.ctypes.data, b.ctypes.data, min(len(a), len(b))))

    return compare


def build_cpp(name: str) -> Path:
    """The shared library of `kernels/<name>`, compiled if the cache has none for this source, flags and machine."""
    source = SOURCES / name
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompileError(f"no C++ compiler for {name}: install g++ or clang, or set CXX")
    key = hashlib.sha256(source.read_bytes() + repr((compiler, FLAGS, os.uname().machine)).encode()).hexdigest()[:16]
    library = cache_dir() / f"{source.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Ranks start together: each compiles into a file of its own and the last rename wins.
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so", delete=False) as scratch:
            pass
        done = subprocess.run([compiler, *FLAGS, str(source), "-o", scratch.name], capture_output=True, text=True)
        if done.returncode != 0:
            os.unlink(scratch.name)
            raise CompileError(f"{compiler} failed on {name}:\n{done.stderr}")
        os.replace(scratch.name, library)
    return library


def cache_dir() -> Path:
    """Where compiled sources are kept: `$XDG_CACHE_HOME/lockstep`, `~/.cache/lockstep` by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
