"""The row of a results file for one model with random weights: latency of batches 1, 8 and 64, and `nano`, in one load.

    python scripts/bench/bench_decode.py FOLDER_WITH_CONFIG_JSON [FOLDER_FOR_TRACES]

It measures as `lockstep bench latency --input-len 128 --output-len 128` and `lockstep bench throughput --preset nano`
do, and traces after everything has been timed. Last line: JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from lockstep.launch.bench.engine_benchmark import EngineBenchmark, batch, describe, nano, time_latency
from lockstep.launch.bench.trace import write_trace
from lockstep.runtime.config import Config


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    folder, *traces = map(Path, sys.argv[1:])
    config = Config(
        model=str(folder),
        load_format="dummy",
        max_model_len=4096,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
    )
    workloads = {f"batch_{size}": batch(size, 128, 128) for size in (1, 8, 64)} | {"nano": nano()}
    with EngineBenchmark(config, list(workloads.values())) as bench:
        latencies = {k: time_latency(bench, w, warmup=2, times=5) for k, w in workloads.items() if k != "nano"}
        runs = {k: latency.whole for k, latency in latencies.items()} | {"nano": bench.run(workloads["nano"])}
        found: dict[str, object] = {"model": folder.name, "startup_s": bench.executor.startup}
        found |= {f"ms_per_token_{k}": latency.ms_per_output_token for k, latency in latencies.items()}
        for name, run in runs.items():
            profile = bench.profile(workloads[name], num_steps=32)
            found[name] = asdict(describe(run, profile))
            for path in traces:
                write_trace(profile.trace, path / f"{folder.name}-{name}.json.gz")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
