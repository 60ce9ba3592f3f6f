"""The sources in csrc/, and C++ compiled with the system's compiler on first use, into a cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++17")


class CompileError(RuntimeError):
    """A source did not compile; the message is the compiler's log."""


@functools.cache
def prefix_compare() -> Callable[[np.ndarray, np.ndarray], int] | None:
    """Return the compiled common_prefix_length, or None (logged once) if it cannot be built: NumPy then serves."""
    try:
        library = build_library("common_prefix_length", source_text("common_prefix_length.cpp"))
        function = ctypes.CDLL(str(library)).common_prefix_length
    except (CompileError, OSError) as error:
        log.warning("prefix cache compares tokens with NumPy, about 5 us a comparison instead of 1 us: %s", error)
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function.restype = ctypes.c_int64

    def compare(a: np.ndarray, b: np.ndarray) -> int:
        return int(function(a.ctypes.data, b.ctypes.data, min(len(a), len(b))))

    return compare


def source_text(name: str) -> str:
    """Return a source of csrc/ with its headers in place of their includes, so that caches see a changed header."""
    text, included = (SOURCES / name).read_text(), set()
    while header := re.search(r'#include "(\w+\.cuh)"\n', text):
        body = "" if header[1] in included else (SOURCES / header[1]).read_text()
        text = text[: header.start()] + body + text[header.end() :]
        included.add(header[1])
    return text


def build_library(name: str, text: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """Return the shared library of this C++ text; compile it unless the cache has it for this text, flags and machine.

    Raises CompileError with the compiler's log, or if there is no compiler.
    """
    command = [cpp_compiler(name), *flags, "-shared", "-fPIC"]
    key = hashlib.sha256(repr((text, command, os.uname().machine)).encode()).hexdigest()[:16]
    library = cache_dir() / f"{name}-{key}.so"
    if not library.exists():
        compile_file(command, text, library)
    return library


def compile_file(command: list[str], text: str, target: Path) -> None:
    """Compile C++ text into `target`. Processes may do so at once: each writes its own file, the last rename wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, output = Path(folder, "source.cpp"), Path(folder, "output")
        source.write_text(text)
        done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{command[0]} failed on {target.name}:\n{done.stderr}")
        os.replace(output, target)


def cpp_compiler(name: str) -> str:
    """Return the C++ compiler, CXX if set; raise CompileError that names what cannot be built without one."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompileError(f"no C++ compiler for {name}: install g++ or clang, or set CXX")
    return compiler


def cache_dir() -> Path:
    """Return the folder for compiled sources: `$XDG_CACHE_HOME/lockstep`, by default `~/.cache/lockstep`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"
