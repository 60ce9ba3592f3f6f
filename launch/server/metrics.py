"""The Prometheus metrics: vLLM's names with the prefix `lockstep:`, so its dashboards only need another prefix."""

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
LENGTHS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))  # tokens
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class Metrics(Collector):
    """Counters and histograms of requests as clients see them, and the engine's statistics at each scrape."""

    def __init__(self, model: str, stats: Callable[[], AsyncEngineStats]) -> None:
        self._model, self._stats, self._registry = model, stats, CollectorRegistry()
        self._registry.register(self)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests with at least one output token.")
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
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self.output_length = self._histogram("request_generation_tokens", "Tokens of an output.", LENGTHS)
        self.decoding = self._histogram("request_decode_time_seconds", "From first to last token.", REQUEST_S)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From request to the output's end.", REQUEST_S)

    def count_finished(self, reason: str) -> None:
        """Count an output that ended for `reason`."""
        self.success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's own statistics; the registry calls it at each scrape."""
        stats, gauge, counter = self._stats(), GaugeMetricFamily, CounterMetricFamily
        kv_usage, engine = stats.kv_usage, stats.engine
        for kind, name, help, value in (
            (gauge, "num_requests_running", "Outputs being computed.", stats.running),
            (gauge, "num_requests_waiting", "Outputs waiting for a place in the batch.", stats.waiting),
            (gauge, "kv_cache_free_pages", "Free pages of the KV cache after the last step.", stats.free_pages),
            (gauge, "kv_cache_usage_perc", "Share of the KV cache that live outputs hold, from 0 to 1.", kv_usage),
            (counter, "num_preemptions", "Outputs preempted because the KV cache was full.", engine.preemptions),
            (counter, "prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries),
            (counter, "prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
            (counter, "engine_steps", "Steps of the engine.", engine.steps),
            (counter, "engine_restarts", "Restarts of the ranks.", stats.restarts),
        ):
            family = kind(f"lockstep:{name}", help, labels=[LABEL])
            family.add_metric([self._model], value)
            yield family

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"lockstep:{name}", help, (LABEL,), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"lockstep:{name}", help, (LABEL,), registry=self._registry, buckets=buckets)
        return histogram.labels(self._model)


class PromptTimer:
    """Observes the latencies of one prompt's outputs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._first: dict[int, float] = {}  # index of the output -> time of its first token
        self._last: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}

    def observe(self, event: Event) -> None:
        """Update the metrics with an event that has just arrived."""
        now, metrics = time.perf_counter(), self._metrics
        if not self._first:
            metrics.prompt_tokens.inc(len(event.prompt_token_ids))
            metrics.prompt_length.observe(len(event.prompt_token_ids))
            metrics.first_token.observe(now - self._start)
        index, num_new = event.index, len(event.token_ids)
        metrics.generation_tokens.inc(num_new)
        if index in self._last and num_new:
            metrics.inter_token.observe((now - self._last[index]) / num_new)
        self._first.setdefault(index, now)
        self._last[index] = now
        self._num_tokens[index] = self._num_tokens.get(index, 0) + num_new
        if event.finish_reason is not None:
            metrics.count_finished(event.finish_reason)
            metrics.end_to_end.observe(now - self._start)
            metrics.output_length.observe(self._num_tokens[index])
            metrics.decoding.observe(now - self._first[index])
            if self._num_tokens[index] > 1:
                metrics.per_token.observe((now - self._first[index]) / (self._num_tokens[index] - 1))
