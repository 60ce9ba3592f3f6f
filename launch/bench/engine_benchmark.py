"""Latency and throughput of an engine without a front end: prompts of random token ids in, token ids out.

So a folder with a config.json and dummy weights is enough. Steps are traced only after everything has been timed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from ...runtime.config import Config
from ...runtime.request import Request, SamplingParams
from ...runtime.stats import EngineStats, Profile
from ..signals import signals_wait
from .trace import kernel_times

POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are submitted together and run to their full length; n outputs for each prompt."""

    input_lens: Sequence[int]
    output_lens: Sequence[int]
    n: int = 1
    temperature: float = 1.0

    @property
    def num_requests(self) -> int:
        return len(self.input_lens) * self.n

    def check(self, max_model_len: int) -> None:
        """Raises ValueError where a request does not fit into the context."""
        input_len, output_len = max(zip(self.input_lens, self.output_lens, strict=True), key=sum)
        if input_len + output_len > max_model_len:
            raise ValueError(
                f"an input of {input_len} and an output of {output_len} tokens make {input_len + output_len},"
                f" but the context is {max_model_len}; shorten them, or raise max_model_len or the KV cache"
            )


def batch(size: int, input_len: int, output_len: int, n: int = 1) -> Workload:
    """`size` prompts of the same lengths."""
    return Workload(input_lens=[input_len] * size, output_lens=[output_len] * size, n=n)


def uniform(num_prompts: int, input_len: int, output_len: int, random_range_ratio: float, seed: int) -> Workload:
    """Lengths uniform in length * (1 - ratio) .. length * (1 + ratio), rounded outwards, at least 1."""
    draw = random.Random(seed)

    def lengths(middle: int) -> list[int]:
        low, high = middle * (1 - random_range_ratio), middle * (1 + random_range_ratio)
        return [draw.randint(max(1, math.floor(low)), math.ceil(high)) for _ in range(num_prompts)]

    return Workload(input_lens=lengths(input_len), output_lens=lengths(output_len))


def nano() -> Workload:
    """The benchmark of nano-vllm and mini-sglang: 256 prompts, inputs and outputs of 100 to 1024 tokens."""
    draw = random.Random(0)
    inputs, outputs = ([draw.randint(100, 1024) for _ in range(256)] for _ in range(2))
    return Workload(input_lens=inputs, output_lens=outputs, temperature=0.6)


@dataclass(frozen=True)
class Run:
    """One or more runs of a workload: seconds of each, and what the engine did in all of them."""

    seconds: list[float]
    stats: EngineStats


class EngineBenchmark:
    """An executor that is ready, for these workloads; ends it when left.

    Raises ValueError, if possible before anything is started, for a workload that does not fit into the context.
    """

    def __init__(self, config: Config, workloads: Sequence[Workload], seed: int = 0) -> None:
        with signals_wait():  # torch: seconds that a wrong option need not wait for
            from ...runtime.checkpoint import find_model
            from ..executors import start_executor

        self.config = config
        folder, model = find_model(config)
        for workload in workloads:
            workload.check(config.max_model_len or model.max_position_embeddings)
        self.executor = start_executor(config, model, folder)
        self._random = np.random.default_rng(seed)
        self._next_uid = 0
        try:
            for workload in workloads:  # the KV cache may have limited the context
                workload.check(self.executor.limits.max_length)
        except ValueError:
            self.executor.close()
            raise

    def __enter__(self) -> EngineBenchmark:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.executor.close()

    def run(self, workload: Workload, times: int = 1, bar: tqdm[Any] | None = None) -> Run:
        """Submit the workload's requests together and wait until all have ended, `times` times, with new prompts each.

        `bar` moves with every request.
        """
        before = self.executor.stats
        seconds = []
        for _ in range(times):
            requests = self._requests(workload)
            started = time.perf_counter()
            self.executor.submit(requests)
            live = {request.uid for request in requests}
            while live:
                ended = self._poll()
                live -= ended
                if bar is not None:
                    bar.update(len(ended))
            seconds.append(time.perf_counter() - started)
        return Run(seconds, self.executor.stats.since(before))

    def profile(self, workload: Workload, num_steps: int) -> Profile:
        """Trace the first `num_steps` decode steps of the workload, and end it there."""
        requests = self._requests(workload)
        self.executor.submit(requests)
        self.executor.start_profile(num_steps)
        live = {request.uid for request in requests}
        while (profile := self.executor.take_profile()) is None:
            live -= self._poll()
        self.executor.cancel(list(live))
        while live:
            live -= self._poll()
        return profile

    def _poll(self) -> set[int]:
        """The requests that have ended since the last call."""
        return {finished.uid for output in self.executor.poll(POLL_S) for finished in output.finished}

    def _requests(self, workload: Workload) -> list[Request]:
        requests = []
        for input_len, output_len in zip(workload.input_lens, workload.output_lens, strict=True):
            prompt = self._random.integers(0, self.executor.limits.vocab_size, input_len).astype(np.int32)
            for _ in range(workload.n):
                params = SamplingParams(temperature=workload.temperature, max_tokens=output_len, seed=self._next_uid)
                requests.append(Request(self._next_uid, prompt, input_len, params, []))
                self._next_uid += 1
        return requests


@dataclass(frozen=True)
class Latency:
    """Runs of one workload whose requests all have the same lengths, after a warm-up."""

    whole: Run
    first: Run  # with one output token only
    output_len: int

    @property
    def ms_per_output_token(self) -> float | None:
        """(time of all tokens - time of one) / (tokens - 1), of medians; None where there is only one."""
        if self.output_len == 1:
            return None
        whole_s, first_s = (float(np.median(run.seconds)) for run in (self.whole, self.first))
        return (whole_s - first_s) / (self.output_len - 1) * 1e3


def time_latency(
    bench: EngineBenchmark, workload: Workload, *, warmup: int, times: int, bar: tqdm[Any] | None = None
) -> Latency:
    """Run `workload`, and its first tokens alone, `times` times each."""
    bench.run(workload, warmup, bar)
    whole = bench.run(workload, times, bar)
    first = bench.run(replace(workload, output_lens=[1] * len(workload.output_lens)), times, bar)
    return Latency(whole, first, workload.output_lens[0])


@dataclass(frozen=True)
class Steps:
    """What the engine's counters and a profile say about the steps of a run; a missing number is None."""

    device: str
    num_steps: int
    prefill_steps: int
    decode_steps: int
    preemptions: int
    prompt_tokens: int  # computed
    output_tokens: int
    output_tokens_per_second: float
    host_us_per_step: float  # schedule, commit and, on a GPU, launch
    schedule_us_per_step: float
    launch_us_per_step: float
    commit_us_per_step: float
    wait_us_per_step: float
    ms_per_decode_step: float | None
    weight_bytes_per_decode_step: int  # these and what follows: of rank 0
    kv_bytes_per_decode_step: float | None
    achieved_gb_per_second: float | None  # 10^9 bytes, of weights and KV
    copy_gb_per_second: float
    share_of_copy: float | None
    profiled_steps: int
    busy_ms_per_decode_step: float | None  # in the profile
    idle_share: float | None
    kernel_shares: dict[str, float]


def describe(run: Run, profile: Profile) -> Steps:
    """Put a timed run and a profile of the same workload together."""
    stats, seconds = run.stats, sum(run.seconds)
    per_step = 1e6 / stats.steps
    launch_s = 0.0 if profile.device == "cpu" else stats.launch_s
    decode_s: float | None = None
    kv_bytes: float | None = None
    speed: float | None = None
    if stats.decode_steps:
        decode_s = stats.decode_s / stats.decode_steps
        kv_bytes = stats.decode_kv_tokens / stats.decode_steps * profile.kv_token_bytes
        speed = (profile.weight_bytes + kv_bytes) / decode_s
    kernels = kernel_times(profile.trace)
    return Steps(
        device=profile.device,
        num_steps=stats.steps,
        prefill_steps=stats.steps - stats.decode_steps,
        decode_steps=stats.decode_steps,
        preemptions=stats.preemptions,
        prompt_tokens=stats.prompt_tokens,
        output_tokens=stats.output_tokens,
        output_tokens_per_second=stats.output_tokens / seconds,
        host_us_per_step=(stats.schedule_s + launch_s + stats.commit_s) * per_step,
        schedule_us_per_step=stats.schedule_s * per_step,
        launch_us_per_step=stats.launch_s * per_step,
        commit_us_per_step=stats.commit_s * per_step,
        wait_us_per_step=stats.wait_s * per_step,
        ms_per_decode_step=None if decode_s is None else decode_s * 1e3,
        weight_bytes_per_decode_step=profile.weight_bytes,
        kv_bytes_per_decode_step=kv_bytes,
        achieved_gb_per_second=None if speed is None else speed / 1e9,
        copy_gb_per_second=profile.copy_bytes_per_s / 1e9,
        share_of_copy=None if speed is None else speed / profile.copy_bytes_per_s,
        profiled_steps=profile.num_steps,
        busy_ms_per_decode_step=kernels.busy_us / 1e3 / profile.num_steps if kernels else None,
        idle_share=kernels.idle_share if kernels else None,
        kernel_shares=kernels.shares if kernels else {},
    )
