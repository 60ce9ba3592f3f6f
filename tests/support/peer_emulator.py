"""kernels/peer_memory.py with all ranks of a group in one process: on a CPU, or as streams of one GPU.

Each rank queues its launches, and `run` runs them. On a CPU the blocks of all ranks take turns at random. Writes reach
other ranks as late as the memory model allows (emulator.hpp), so a missing fence or barrier shows as a wrong result.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels import native, ops
from lockstep.kernels.native import source_text

import emulator

PATH = native.SOURCES.parent / "peer_memory.py"
STORE = "*reinterpret_cast<Vec<T, V>*>(to) = x;"
COPY = "*reinterpret_cast<Packed<T, V>*>(to) = load<T, V>(from);"


class QueuedPeers:
    """The peer memory of a group of ranks, whose launches run at `run`.

    blocks      the most of a launch of 512 threads
    timeout_ns  of a wait for a peer
    """

    def __init__(self, size: int, device: str, *, buffer_bytes: int, blocks: int, timeout_ns: int, alone: bool) -> None:
        self.size, self.device, self._rank = size, torch.device(device), 0
        self._launches: list[tuple[int, str, int, int, tuple[Any, ...]]] = []
        self.kernels: Any = _import_peer_memory(self._kernel)
        start, count = self.kernels.first_inbox(size, buffer_bytes), self.kernels.MAX_RANKS + 1
        self.memory = [
            torch.zeros(start + self.kernels.NUM_INBOXES * buffer_bytes, dtype=torch.uint8, device=device)
            for _ in range(size)
        ]
        for memory in self.memory:
            memory[start:].fill_(self.kernels.EMPTY_BYTE)
        on_gpu = self.device.type == "cuda"
        self.words = [torch.zeros(count, dtype=torch.int64, pin_memory=on_gpu) for _ in range(size)]
        addresses = [memory.data_ptr() for memory in self.memory]
        options = {"timeout_ns": timeout_ns, "buffer_bytes": buffer_bytes, "inbox_bytes": buffer_bytes, "alone": alone}
        self.tables = []
        for rank, words in enumerate(self.words):
            fields = self.kernels.table_fields(addresses, words, rank=rank, **options)
            fields = torch.tensor(fields, dtype=torch.int64, device=device)
            self.tables.append(self.kernels.PeerTable(fields, size, blocks, buffer_bytes))

    @contextmanager
    def on_rank(self, rank: int) -> Iterator[Any]:
        """Queue the launches inside on this rank; yields its PeerTable."""
        self._rank = rank
        yield self.tables[rank]

    def missing(self, rank: int) -> list[int]:
        """Return the ranks for which this one has waited in vain."""
        return [peer for peer, word in enumerate(self.words[rank][: self.size].tolist()) if word]

    def run(self) -> None:
        """Run all queued launches."""
        raise NotImplementedError

    def _kernel(self, source: str, name: str, *, early: bool) -> Callable[..., None]:
        def launch(grid: tuple[int, int], threads: int, *arguments: Any) -> None:
            assert grid[1] == 1
            assert threads % 32 == 0
            assert 0 < threads <= self.kernels.THREADS
            self._launches.append((self._rank, name, grid[0], threads, arguments))

        return launch


class PeerStreams(QueuedPeers):
    """Ranks that share a GPU, each in a stream of this process, which therefore needs no MPS."""

    def __init__(self, size: int, *, buffer_bytes: int, timeout_ns: int = 2_000_000_000) -> None:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        blocks = max(1, processors // (2 * size))  # all ranks' blocks must fit on the GPU: they wait for each other
        options = {"buffer_bytes": buffer_bytes, "timeout_ns": timeout_ns}
        super().__init__(size, "cuda", blocks=blocks, alone=False, **options)
        self._streams = [torch.cuda.Stream() for _ in range(size)]

    def run(self) -> None:
        from lockstep.kernels.cuda.kernel_launch import kernel

        launches, self._launches = self._launches, []
        # Loading a kernel may wait for those that run.
        kernels = {name: kernel("peer_collectives.cu", name, early=True) for _, name, *_ in launches}
        torch.cuda.synchronize()
        for rank, name, blocks, threads, arguments in launches:
            with torch.cuda.stream(self._streams[rank]):
                kernels[name]((blocks, 1), threads, *arguments)
        torch.cuda.synchronize()


class PeerEmulator(QueuedPeers):
    """Ranks whose threads are fibers of this process.

    threads     the most of a block, in place of 512
    timeout_ns  a turn of a thread lasts one
    mutate      changes the source: a test that must fail with it
    """

    def __init__(
        self,
        size: int,
        *,
        buffer_bytes: int,
        blocks: int = 2,
        threads: int = 64,
        timeout_ns: int = 3_000_000,
        mutate: Callable[[str], str] = lambda source: source,
    ) -> None:
        super().__init__(size, "cpu", buffer_bytes=buffer_bytes, blocks=blocks, timeout_ns=timeout_ns, alone=True)
        self._mutate = mutate
        self.kernels.THREADS = threads

    def run(self) -> None:
        launches, self._launches = self._launches, []
        names = sorted({name for _, name, *_ in launches})
        library = emulator.compiled(_program(self._mutate(source_text("peer_collectives.cu")), names))
        library.run.restype = ctypes.c_char_p
        kept = [_addresses(arguments) for *_, arguments in launches]
        numbers = [[rank, names.index(name), blocks, threads] for rank, name, blocks, threads, _ in launches]
        flat = np.array(numbers, dtype=np.int32)
        memories = np.array([[m.data_ptr(), m.data_ptr() + len(m)] for m in self.memory], dtype=np.int64)
        values = (ctypes.c_void_p * len(kept))(*(ctypes.addressof(array) for array in kept))
        fault = library.run(
            self.size, ctypes.c_void_p(memories.ctypes.data), len(kept), ctypes.c_void_p(flat.ctypes.data), values
        )
        assert fault is None, fault.decode()


def _import_peer_memory(kernel: Callable[..., Any]) -> ModuleType:
    """Return kernels/peer_memory.py, imported once more, with another `kernel`."""
    package: Any = ModuleType("lockstep.kernels.cuda")
    package.__path__, package.kernel_launch = [], ModuleType("lockstep.kernels.cuda.kernel_launch")
    vars(package.kernel_launch).update(vars(emulator.emulated()), kernel=kernel)
    stubs: dict[str, Any] = {name: ModuleType(name) for name in ("cupy", "cuda", "cuda.bindings")}
    stubs["cuda.bindings"].driver = None
    stubs |= {"lockstep.kernels.cuda": package, "lockstep.kernels.cuda.kernel_launch": package.kernel_launch}
    spec = importlib.util.spec_from_file_location(f"{ops.__package__}.emulated_peer_memory", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {**stubs, spec.name: module}):
        spec.loader.exec_module(module)
    return module


def _addresses(arguments: tuple[Any, ...]) -> Any:
    """Return the arguments as an array of pointers to their values; it keeps the values alive."""
    values = [np.array(a.data_ptr()) if isinstance(a, Tensor) else np.array(a) for a in arguments]
    array = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    array.kept = values, arguments
    return array


def _program(text: str, names: list[str]) -> str:
    for plain in (STORE, COPY):
        assert text.count(plain) == 1
    text = text.replace(STORE, "emulator::write(to, x);").replace(COPY, "emulator::write(to, load<T, V>(from));")
    text = emulator.in_cpp(text)
    text = re.sub(
        r"__shared__ (\w+) (\w+)((?:\[.*?\])+);",
        r"auto& \2 = emulator::shared_variable<__COUNTER__, \1\3>();",
        text,
    )
    bodies = ", ".join(f"[](void** values) {{ emulator::call(&{name}, values); }}" for name in names)
    return f"""#include "emulator.hpp"
{text}
void (*const bodies[])(void**) = {{{bodies}}};
extern "C" const char* run(int size, char** memories, int count, const int (*launches)[4], void*** values) {{
    emulator::ranks.resize(size);
    for (int i = 0; i < 2 * size; i += 2) emulator::memories.push_back({{memories[i], memories[i + 1]}});
    for (int i = 0; i < count; ++i) {{
        const auto& [rank, kernel, blocks, threads] = launches[i];
        emulator::ranks[rank].grids.push_back({{bodies[kernel], values[i], {{blocks, 1}}, {{threads, 1}}, rank}});
    }}
    return emulator::run_ranks();
}}
"""
