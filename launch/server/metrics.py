"""The Prometheus metrics: vLLM's names and labels with the prefix `lockstep:`.

vLLM's dashboards only need another prefix. examples/grafana_board.json is one for these metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...runtime.executor import RankLocation
from ...runtime.outputs import Event
from ...runtime.stats import Distribution
from ..engine.async_engine import AsyncEngineStats

LABELS = ("model_name", "engine")  # the engine has the number 0: all ranks and replicas are one, as users see it
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
LENGTHS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))  # tokens
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class Metrics(Collector):
    """Counters and histograms of requests as clients see them, and the engine's statistics at each scrape."""

    def __init__(self, model: str, stats: Callable[[], AsyncEngineStats]) -> None:
        self._labels, self._stats, self._registry = (model, "0"), stats, CollectorRegistry()
        self._registry.register(self)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests with at least one output token.")
        self.num_generated = 0
        self.success = Counter(
            "lockstep:request_success", "Outputs that ended, by reason.", (*LABELS, "finished_reason"),
            registry=self._registry,
        )  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "From request to first token.", TTFT_S)
        self.inter_token = Distribution(TOKEN_S)  # prometheus_client's takes ten times as long
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, of an output.", TOKEN_S
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", LENGTHS)
        self.output_length = self._histogram("request_generation_tokens", "Tokens of an output.", LENGTHS)
        self.longest_output = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest output of a prompt.", LENGTHS
        )
        self.decoding = self._histogram("request_decode_time_seconds", "From first to last token.", REQUEST_S)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From request to the output's end.", REQUEST_S)

    def count_finished(self, reason: str) -> None:
        """Count an output that ended for `reason`."""
        self.success.labels(*self._labels, reason).inc()

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's own statistics; the registry calls it at each scrape."""
        stats, gauge, counter = self._stats(), GaugeMetricFamily, CounterMetricFamily
        kv_usage, engine, seen = stats.kv_usage, stats.engine, stats.distributions
        for name, help, distribution in (
            ("inter_token_latency_seconds", "Between tokens of an output.", self.inter_token),
            ("iteration_tokens_total", "Tokens computed in a step.", seen.step_tokens),
            ("request_queue_time_seconds", "From request to the output's admission by the engine.", seen.queue_s),
            ("request_prefill_time_seconds", "From an output's admission to its first token.", seen.prefill_s),
        ):
            yield self._histogram_family(name, help, distribution)
        yield from self._rank_families(stats.ranks)
        yield self._family(counter, "step_time_seconds", "Time of rank 0, by part of a step.", (
            (("schedule",), engine.schedule_s), (("launch",), engine.launch_s), (("wait",), engine.wait_s),
            (("commit",), engine.commit_s),
        ), "part")  # fmt: skip
        computed_tokens = engine.prompt_tokens + engine.output_tokens
        for kind, name, help, value in (
            (gauge, "num_requests_running", "Outputs being computed.", stats.running),
            (gauge, "num_requests_waiting", "Outputs waiting for a place in the batch.", stats.waiting),
            (gauge, "kv_cache_free_pages", "Free pages of the KV cache after the last step.", stats.free_pages),
            (gauge, "kv_cache_usage_perc", "Share of the KV cache that live outputs hold, from 0 to 1.", kv_usage),
            (counter, "generation_tokens", "Tokens generated.", self.num_generated),
            (counter, "num_preemptions", "Outputs preempted because the KV cache was full.", engine.preemptions),
            (counter, "prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries),
            (counter, "prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
            (counter, "engine_steps", "Steps of the engine.", engine.steps),
            (counter, "decode_step_time_seconds", "Length of the steps that only decode.", engine.decode_s),
            (counter, "decode_steps", "Steps that only decode.", engine.decode_steps),
            (counter, "computed_tokens", "Tokens that steps computed.", computed_tokens),
            (counter, "engine_restarts", "Restarts of the ranks.", stats.restarts),
        ):
            yield self._family(kind, name, help, (((), value),))

    def _rank_families(self, ranks: Sequence[RankLocation]) -> Iterator[Metric]:
        labels = "rank", "host", "device"
        names = [(str(rank.rank), rank.host, rank.device) for rank in ranks]
        for name, help, values in (
            ("rank_weight_bytes", "Weights in a rank's memory.", [rank.weight_bytes for rank in ranks]),
            ("rank_kv_cache_bytes", "KV cache in a rank's memory.", [rank.kv_cache_bytes for rank in ranks]),
            ("rank_reduced_bytes_per_token", "Bytes of a token that a rank gives to all-reduces.",
             [rank.reduced_token_bytes for rank in ranks]),
        ):  # fmt: skip
            yield self._family(GaugeMetricFamily, name, help, zip(names, values, strict=True), *labels)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help: str,
        values: Iterable[tuple[Sequence[str], float]],
        *labels: str,
    ) -> Metric:
        family = kind(f"lockstep:{name}", help, labels=[*LABELS, *labels])
        for names, value in values:
            family.add_metric([*self._labels, *names], value)
        return family

    def _histogram_family(self, name: str, help: str, distribution: Distribution) -> Metric:
        family = HistogramMetricFamily(f"lockstep:{name}", help, labels=LABELS)
        bounds = [*map(floatToGoString, distribution.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(distribution.counts), strict=True))
        family.add_metric(self._labels, buckets, distribution.total)
        return family

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"lockstep:{name}", help, LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"lockstep:{name}", help, LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)


class PromptTimer:
    """Observes the latencies of one prompt's outputs."""

    def __init__(self, metrics: Metrics, n: int = 1) -> None:
        self._metrics, self._n = metrics, n
        self._start = time.perf_counter()
        self._first: dict[int, float] = {}  # index of the output -> time of its first token
        self._last: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._num_ended = 0

    def observe(self, event: Event) -> None:
        """Update the metrics with an event that has just arrived; on the path of every token."""
        now, index, num_new = time.perf_counter(), event.index, len(event.token_ids)
        last = self._last.get(index)
        if last is None:
            self._begin(event, now)
        elif num_new:
            self._metrics.inter_token.observe((now - last) / num_new)
        self._last[index] = now
        self._metrics.num_generated += num_new
        self._num_tokens[index] += num_new
        if event.finish_reason is not None:
            self._end(index, event.finish_reason, now)

    def _begin(self, event: Event, now: float) -> None:
        """Observe the first event of an output."""
        metrics = self._metrics
        if not self._first:
            metrics.prompt_tokens.inc(len(event.prompt_token_ids))
            metrics.prompt_length.observe(len(event.prompt_token_ids))
            metrics.first_token.observe(now - self._start)
        self._first[event.index], self._num_tokens[event.index] = now, 0

    def _end(self, index: int, reason: str, now: float) -> None:
        """Observe the end of an output."""
        metrics, num_tokens, decode_s = self._metrics, self._num_tokens[index], now - self._first[index]
        metrics.count_finished(reason)
        metrics.end_to_end.observe(now - self._start)
        metrics.output_length.observe(num_tokens)
        metrics.decoding.observe(decode_s)
        self._num_ended += 1
        if self._num_ended == self._n:
            metrics.longest_output.observe(max(self._num_tokens.values()))
        if num_tokens > 1:
            metrics.per_token.observe(decode_s / (num_tokens - 1))
