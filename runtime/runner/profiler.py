"""A trace of decode steps on rank 0, made on request."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity

from ..plan import StepPlan
from ..stats import Profile
from .rank_memory import RankMemory


class Profiler:
    """Traces the next uninterrupted run of decode steps, at most `num_steps`."""

    def __init__(self, memory: RankMemory, num_steps: int) -> None:
        self._memory = memory
        self._num_steps = num_steps
        self._num_traced = 0
        self._trace: torch.profiler.profile | None = None

    def before_launch(self, plan: StepPlan | None) -> Profile | None:
        """Start or end the trace before `plan`, or None, is launched; return the profile once it is complete."""
        if plan is not None and plan.is_decode_only and self._num_traced < self._num_steps:
            self._trace = self._trace or self._start()
            self._num_traced += 1
            return None
        if self._trace is None and plan is not None:  # still busy with prompts
            return None
        return self._finish()

    def _start(self) -> torch.profiler.profile:
        _synchronize(self._memory.device)  # so that the trace does not contain the step before
        # On a GPU, record only kernels: recording torch's ops as well would slow down the host, and leave gaps.
        cuda = self._memory.device.type == "cuda"
        trace = torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        trace.start()
        return trace

    def _finish(self) -> Profile:
        device, decoder, kv = self._memory.device, self._memory.decoder, self._memory.pool.shape
        trace = b"" if self._trace is None else _stop(self._trace, device)
        weight_bytes = sum(w.tensor.nbytes for w in decoder.weights)
        if not decoder.config.tie_word_embeddings:
            weight_bytes -= decoder.embedding.weight.nbytes
        return Profile(
            num_steps=self._num_traced,
            trace=trace,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            weight_bytes=weight_bytes,
            kv_token_bytes=kv.page_bytes // kv.page_size // kv.num_layers * len(decoder.places),
            copy_bytes_per_s=copy_bytes_per_s(device),
        )


def copy_bytes_per_s(device: torch.device) -> float:
    """Measure the bytes read and written per second by copies on `device`, the best of three.

    Copies have 1 GiB on a GPU, or a quarter of its free memory if that is less, and 256 MiB on a CPU.
    """
    size, copies = 2**28, 1
    if device.type == "cuda":
        size, copies = min(2**30, torch.cuda.mem_get_info(device)[0] // 4), 8
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = source.clone()
    seconds = []
    for _ in range(3):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size * copies / min(seconds)


def _stop(trace: torch.profiler.profile, device: torch.device) -> bytes:
    _synchronize(device)
    trace.stop()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        return path.read_bytes()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
