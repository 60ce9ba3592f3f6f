"""Latency and throughput of an engine without a front end: random token ids in, token ids out.

A folder with a config.json is enough, with dummy weights. Steps are traced only after all timing is done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...runtime.config import Config
from ...runtime.request import Request
from ...runtime.sampling_params import SamplingParams
from ...runtime.stats import EngineStats, Profile
from ..cluster.ray_starter import start_ray_ahead
from ..signals import signals_wait
from .trace import kernel_times
from .workload import Workload

if TYPE_CHECKING:
    from ...runtime.executor import Executor

POLL_S = 1.0
PERCENTAGES = (10, 25, 50, 75, 90, 99)  # vLLM reports the same


@dataclass(frozen=True)
class TimedRuns:
    """One or more runs of a workload: the seconds of each, and the engine's counters over all of them."""

    seconds: list[float]
    stats: EngineStats


class EngineBenchmark:
    """An executor that is ready for these workloads; leaving the context closes it.

    Raises ValueError for a workload that does not fit into the context, if possible before the executor starts.
    """

    def __init__(self, config: Config, workloads: Sequence[Workload], seed: int = 0) -> None:
        self.config = config
        self.executor = self._start(workloads)
        self._generator = np.random.default_rng(seed)
        self._uids = itertools.count()
        try:
            for workload in workloads:  # the KV cache may have limited the context
                workload.check(self.executor.limits.max_length)
        except ValueError:
            self.executor.close()
            raise

    def _start(self, workloads: Sequence[Workload]) -> Executor:
        with start_ray_ahead(self.config):
            with signals_wait():  # imports torch, which takes seconds: a wrong option is refused before
                from ...runtime.model.checkpoint import find_model
                from ..executor_choice import start_executor

            folder, model = find_model(self.config)
            for workload in workloads:
                workload.check(self.config.max_model_len or model.max_position_embeddings)
            return start_executor(self.config, model, folder)

    def __enter__(self) -> EngineBenchmark:
        return self

    def __exit__(self, *error: object) -> None:
        self.executor.close()

    def run(self, workload: Workload, times: int = 1, bar: tqdm[Any] | None = None) -> TimedRuns:
        """Submit all requests together and wait for the last one, `times` times with new prompts; `bar` counts them."""
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
        return TimedRuns(seconds, self.executor.stats - before)

    def profile(self, workload: Workload, num_steps: int) -> Profile:
        """Trace the first `num_steps` decode steps of the workload, and cancel the rest."""
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
        """Return the requests that have ended since the last call."""
        return {finished.uid for output in self.executor.poll(POLL_S) for finished in output.finished}

    def _requests(self, workload: Workload) -> list[Request]:
        requests = []
        for input_len, output_len in zip(workload.input_lens, workload.output_lens, strict=True):
            prompt = self._generator.integers(0, self.executor.limits.vocab_size, input_len).astype(np.int32)
            for uid in itertools.islice(self._uids, workload.n):
                params = SamplingParams(max_tokens=output_len, seed=uid, **workload.sampling)  # type: ignore[arg-type]
                requests.append(Request(uid, prompt, input_len, params, []))
        return requests


def time_latency(
    bench: EngineBenchmark, workload: Workload, *, warmup: int, times: int, bar: tqdm[Any]
) -> tuple[TimedRuns, dict[str, Any]]:
    """Run requests of equal lengths, and then their first tokens alone, `times` times each after a warm-up.

    Returns the run of all tokens, and the result under vLLM's keys, with more of lockstep.
    """
    bench.run(workload, warmup, bar)
    run = bench.run(workload, times, bar)
    first = bench.run(replace(workload, output_lens=[1] * len(workload.output_lens)), times, bar)
    further_tokens = workload.output_lens[0] - 1
    further_s = float(np.median(run.seconds) - np.median(first.seconds))
    return run, {
        "avg_latency": float(np.mean(run.seconds)),
        "latencies": run.seconds,
        "first_token_latencies": first.seconds,
        "percentiles": {str(p): float(np.percentile(run.seconds, p)) for p in PERCENTAGES},
        "ms_per_output_token": further_s / further_tokens * 1e3 if further_tokens else None,
    }


def report_steps(run: TimedRuns, profile: Profile) -> dict[str, Any]:
    """Return counters and times of the steps of a timed run, with a profile of the same workload.

    Numbers that cannot be known are None. Bytes, bandwidth and profile are those of rank 0.
    """
    stats, seconds = run.stats, sum(run.seconds)
    us_per_step = 1e6 / stats.steps
    launch_s = 0.0 if profile.device == "cpu" else stats.launch_s
    decode_s = kv_bytes = bytes_per_s = None  # the averages of a decode step
    if stats.decode_steps:
        decode_s = stats.decode_s / stats.decode_steps
        kv_bytes = stats.decode_kv_tokens / stats.decode_steps * profile.kv_token_bytes
        bytes_per_s = (profile.weight_bytes + kv_bytes) / decode_s
    kernels = kernel_times(profile.trace)
    return {
        "device": profile.device,
        "num_steps": stats.steps,
        "prefill_steps": stats.steps - stats.decode_steps,
        "decode_steps": stats.decode_steps,
        "preemptions": stats.preemptions,
        "prompt_tokens": stats.prompt_tokens,  # counts computed tokens only
        "output_tokens": stats.output_tokens,
        "output_tokens_per_second": stats.output_tokens / seconds,
        # schedule, commit and, on a GPU, launch
        "host_us_per_step": (stats.schedule_s + launch_s + stats.commit_s) * us_per_step,
        "schedule_us_per_step": stats.schedule_s * us_per_step,
        "launch_us_per_step": stats.launch_s * us_per_step,
        "commit_us_per_step": stats.commit_s * us_per_step,
        "wait_us_per_step": stats.wait_s * us_per_step,
        "ms_per_decode_step": None if decode_s is None else decode_s * 1e3,
        "weight_bytes_per_decode_step": profile.weight_bytes,
        "kv_bytes_per_decode_step": kv_bytes,
        "achieved_gb_per_second": None if bytes_per_s is None else bytes_per_s / 1e9,
        "copy_gb_per_second": profile.copy_bytes_per_s / 1e9,
        "share_of_copy": None if bytes_per_s is None else bytes_per_s / profile.copy_bytes_per_s,
        "profiled_steps": profile.num_steps,
        "busy_ms_per_decode_step": kernels.busy_us / 1e3 / profile.num_steps if kernels else None,
        "idle_share": kernels.idle_share if kernels else None,
        "exposed_communication_share": kernels.exposed_share if kernels else None,
        "kernel_shares": kernels.shares if kernels else {},
    }
