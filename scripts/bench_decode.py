"""Decode latency and throughput of one rank with random weights, without a front end.

    python scripts/bench_decode.py FOLDER_WITH_CONFIG_JSON

Latency: prompts of 128 tokens, (time of 128 tokens - time of 1) / 127, the better of two runs. Throughput, `nano`: 256
requests at once, input and output lengths U(100, 1024), seed 0, temperature 0.6, no stop. Last line: JSON.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lockstep.runtime.config import Config
from lockstep.runtime.executor import LocalExecutor
from lockstep.runtime.model.config import ModelConfig
from lockstep.runtime.request import Request, SamplingParams

BATCHES = (1, 8, 64)


class Bench:
    """An executor and the requests it has seen."""

    def __init__(self, folder: Path) -> None:
        started = time.perf_counter()
        self.config = Config(
            model=str(folder),
            load_format="dummy",
            max_model_len=4096,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
        )
        self.executor = LocalExecutor(self.config, ModelConfig.from_folder(folder), folder)
        self.ready_s = time.perf_counter() - started
        self._random = np.random.default_rng(0)
        self._uid = 0

    def run(self, inputs: Sequence[int], outputs: Sequence[int], temperature: float = 0.0) -> float:
        """Seconds until requests of these lengths, submitted together, have all ended."""
        requests = []
        for length, max_tokens in zip(inputs, outputs, strict=True):
            tokens = self._random.integers(0, 1000, length).astype(np.int32)
            params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=self._uid)
            requests.append(Request(self._uid, tokens, length, params, []))
            self._uid += 1
        started = time.perf_counter()
        self.executor.submit(requests)
        left = len(requests)
        while left:
            left -= sum(len(output.finished) for output in self.executor.poll(1.0))
        return time.perf_counter() - started

    def latency_ms(self, batch: int) -> float:
        self.run([128] * batch, [8] * batch)
        first = min(self.run([128] * batch, [1] * batch) for _ in range(2))
        whole = min(self.run([128] * batch, [128] * batch) for _ in range(2))
        return (whole - first) / 127 * 1e3

    def nano(self) -> float:
        """Output tokens per second."""
        lengths = random.Random(0)
        inputs, outputs = ([lengths.randint(100, 1024) for _ in range(256)] for _ in range(2))
        return sum(outputs) / self.run(inputs, outputs, temperature=0.6)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    bench = Bench(Path(sys.argv[1]))
    found: dict[str, object] = {"model": Path(sys.argv[1]).name, "ready_s": round(bench.ready_s, 2)}
    for batch in BATCHES:
        found[f"ms_per_token_batch_{batch}"] = round(bench.latency_ms(batch), 3)
    found["nano_output_tokens_per_s"] = round(bench.nano())
    found["torch"] = torch.__version__
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
