"""The metrics: what dashboards read, and the times of a request against what a client measures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from lockstep.launch.engine.async_engine import AsyncEngine
from lockstep.runtime.stats import Distribution

from fake_engine import PROMPT, Running, demo_server
from step_gate import steps_limited
from waiting import wait_until

BOARD = Path(__file__).parents[3] / "examples" / "grafana_board.json"
# What the three dashboards that vLLM 0.33 ships read, and their labels.
VLLM_NAMES = [
    "e2e_request_latency_seconds_bucket", "generation_tokens_total",
    "inter_token_latency_seconds_bucket", "iteration_tokens_total_count",
    "kv_cache_usage_perc", "num_requests_running",
    "num_requests_waiting", "prompt_tokens_total",
    "request_decode_time_seconds_sum", "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum", "request_prefill_time_seconds_sum",
    "request_prompt_tokens_bucket", "request_queue_time_seconds_sum",
    "request_success_total", "request_time_per_output_token_seconds_bucket",
    "time_to_first_token_seconds_bucket",
]  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Iterator[Running]:
    with demo_server(served_model_name=["demo"]) as running:
        yield running


def metrics(real: Running) -> dict[str, float]:
    """The values by name and labels."""
    lines = real.http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_dashboards_find_their_metrics(real: Running) -> None:
    assert real.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3}).status_code == 200
    names = {key.partition("{")[0] for key in metrics(real)}
    board = json.loads(BOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    read = {name for expression in expressions for name in re.findall(r"lockstep:\w+", expression)}
    assert len(expressions) > 20
    assert read <= names
    assert {f"lockstep:{name}" for name in VLLM_NAMES} <= names
    assert all('model_name="demo"' in key and 'engine="0"' in key for key in metrics(real) if key[:9] == "lockstep:")
    panels = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in panels for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_times_of_a_request(real: Running) -> None:
    def sums() -> dict[str, float]:
        found = metrics(real)
        names = ("queue_time", "prefill_time", "decode_time", "max_num_generation_tokens")
        keys = {name: name if "tokens" in name else f"{name}_seconds" for name in names}
        sum_of: dict[str, float] = {}
        for name, key in keys.items():
            for kind in ("sum", "count"):
                sum_of[f"{name} {kind}"] = found[f'lockstep:request_{key}_{kind}{{engine="0",model_name="demo"}}']
        for kind in ("sum", "count"):
            sum_of[f"steps {kind}"] = found[f'lockstep:iteration_tokens_total_{kind}{{engine="0",model_name="demo"}}']
        return sum_of

    before = sums()
    started = time.perf_counter()
    body: dict[str, Any] = {"prompt": [5 + i % 90 for i in range(301)], "max_tokens": 6, "n": 12, "ignore_eos": True}
    assert real.post("/v1/completions", body).status_code == 400, "8 outputs at once"
    body["n"] = 8
    assert real.post("/v1/completions", body).status_code == 200
    # 8 outputs run at once, so these wait for a place.
    bodies = [body | {"prompt": body["prompt"][i:]} for i in (7, 8, 9)]
    engine = cast(AsyncEngine, real.service)
    with ThreadPoolExecutor(3) as threads:
        with steps_limited(engine, 0):
            answers = [threads.submit(real.post, "/v1/completions", body) for body in bodies]
            wait_until(lambda: engine.stats().num_live == 24)
        assert {answer.result().status_code for answer in answers} == {200}
    seconds = time.perf_counter() - started
    grown = {name: value - before[name] for name, value in sums().items()}
    for name in ("queue_time", "prefill_time", "decode_time"):
        assert grown[f"{name} count"] == 32
        assert 0 < grown[f"{name} sum"] < 32 * seconds
    assert grown["queue_time sum"] > grown["prefill_time sum"], "at most 8 of 24 outputs ran at once"
    assert grown["max_num_generation_tokens count"] == 4
    assert grown["max_num_generation_tokens sum"] == 24
    assert grown["steps sum"] >= 301 + 32 * 5, "the steps computed the prompt once, and each token but the last"
    assert 6 <= grown["steps count"] < 200


def test_distribution_counts_as_prometheus_does() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    bounds, values = (1.0, 2.5, 10.0), (0.2, 1.0, 1.1, 2.5, 9.0, 10.0, 11.0, 500.0)
    expected = Histogram("h", "h", registry=CollectorRegistry(), buckets=bounds)
    actual = Distribution(bounds)
    for value in values:
        expected.observe(value)
        actual.observe(value)
    samples = [s.value for s in expected.collect()[0].samples if s.name == "h_bucket"]
    assert [sum(actual.counts[: i + 1]) for i in range(4)] == samples
    assert actual.total == sum(values)
