"""What Prometheus reads: vLLM's names under our prefix, so that its dashboards need a search and replace only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...runtime.outputs import Event
from ..engine.async_engine import AsyncEngineStats

LABEL = "model_name"
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class Metrics:
    """Counters and histograms of what clients saw; the gauges are the service's own figures when they are read."""

    def __init__(self, model: str, stats: Callable[[], AsyncEngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Readings(model, stats))
        self._model = model
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.success = Counter(
            "lockstep:request_success", "Outputs that ended, by reason.", (LABEL, "finished_reason"),
            registry=self._registry,
        )  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "From request to first token.", TTFT_S)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between tokens of an output.", TOKEN_S)
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, of an output.", TOKEN_S
        )
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From request to the output's end.", REQUEST_S)

    def ended(self, reason: str) -> None:
        self.success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"lockstep:{name}", help, (LABEL,), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        found = Histogram(f"lockstep:{name}", help, (LABEL,), registry=self._registry, buckets=buckets)
        return found.labels(self._model)


class Timing:
    """The clock of one prompt's outputs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def saw(self, event: Event) -> None:
        now, metrics = time.perf_counter(), self._metrics
        if not self._first:
            metrics.prompt_tokens.inc(len(event.prompt_token_ids))
            metrics.first_token.observe(now - self._start)
        index, new = event.index, len(event.token_ids)
        metrics.generation_tokens.inc(new)
        if index in self._last and new:
            metrics.inter_token.observe((now - self._last[index]) / new)
        self._first.setdefault(index, now)
        self._last[index] = now
        self._tokens[index] = self._tokens.get(index, 0) + new
        if event.finish_reason is not None:
            metrics.ended(event.finish_reason)
            metrics.end_to_end.observe(now - self._start)
            if self._tokens[index] > 1:
                metrics.per_token.observe((now - self._first[index]) / (self._tokens[index] - 1))


class _Readings(Collector):
    """Figures that the service keeps itself."""

    def __init__(self, model: str, stats: Callable[[], AsyncEngineStats]) -> None:
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "num_requests_running": ("Outputs being computed.", stats.running),
            "num_requests_waiting": ("Outputs waiting for a place in the batch.", stats.waiting),
            "kv_cache_free_pages": ("Pages of the KV cache that nobody holds, after the last step.", stats.free_pages),
            "kv_cache_usage_perc": ("Share of the KV cache that live outputs hold; 1 is all.", stats.kv_usage),
        }
        counters = {
            "num_preemptions": ("Outputs put back for want of KV cache.", stats.engine.preemptions),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Tokens found in the prefix cache.", stats.prefix_hits),
            "engine_steps": ("Steps of the engine.", stats.engine.steps),
            "engine_restarts": ("Times that the ranks were started again.", stats.restarts),
        }
        for name, (help, value) in gauges.items():
            yield self._one(GaugeMetricFamily(f"lockstep:{name}", help, labels=[LABEL]), value)
        for name, (help, value) in counters.items():
            yield self._one(CounterMetricFamily(f"lockstep:{name}", help, labels=[LABEL]), value)

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
