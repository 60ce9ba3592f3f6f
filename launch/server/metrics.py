"""The page of Prometheus metrics: vLLM's names and labels with the prefix `lockstep:`.

vLLM's dashboards only need another prefix. examples/grafana_board.json is one for these metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ...runtime.rank_location import RankLocation
from ...runtime.stats import Distribution
from ..engine.engine_state import AsyncEngineStats
from .request_metrics import RequestMetrics

LABELS = ("model_name", "engine")  # the engine has the number 0: all ranks and replicas are one, as users see it


def metrics_page(model: str, stats: AsyncEngineStats, requests: RequestMetrics) -> bytes:
    """Return all metrics in the text format of Prometheus."""
    registry = CollectorRegistry()
    registry.register(MetricFamilies(model, stats, requests))
    return generate_latest(registry)


class MetricFamilies(Collector):
    """The metrics of one scrape."""

    def __init__(self, model: str, stats: AsyncEngineStats, requests: RequestMetrics) -> None:
        self._labels, self._stats, self._requests = (model, "0"), stats, requests

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the requests, of the ranks and of the engine."""
        yield from self._histogram_families()
        yield from self._rank_families(self._stats.ranks)
        yield from self._engine_families()

    def _histogram_families(self) -> Iterator[Metric]:
        requests, seen = self._requests, self._stats.distributions
        for name, help, distribution in (
            ("time_to_first_token_seconds", "From request to first token.", requests.first_token_s),
            ("inter_token_latency_seconds", "Between tokens of an output.", requests.inter_token_s),
            ("request_time_per_output_token_seconds", "Mean time per token after the first, of an output.",
             requests.per_token_s),
            ("request_prompt_tokens", "Prompt tokens of a request.", requests.prompt_length),
            ("request_generation_tokens", "Tokens of an output.", requests.output_length),
            ("request_max_num_generation_tokens", "Tokens of the longest output of a prompt.", requests.longest_output),
            ("request_decode_time_seconds", "From first to last token.", requests.decoding_s),
            ("e2e_request_latency_seconds", "From request to the output's end.", requests.end_to_end_s),
            ("iteration_tokens_total", "Tokens computed in a step.", seen.step_tokens),
            ("request_queue_time_seconds", "From request to the output's admission by the engine.", seen.queue_s),
            ("request_prefill_time_seconds", "From an output's admission to its first token.", seen.prefill_s),
        ):  # fmt: skip
            yield self._histogram_family(name, help, distribution)

    def _engine_families(self) -> Iterator[Metric]:
        stats, requests, gauge, counter = self._stats, self._requests, GaugeMetricFamily, CounterMetricFamily
        engine = stats.engine
        yield self._family(counter, "step_time_seconds", "Time of rank 0, by part of a step.", (
            (("schedule",), engine.schedule_s), (("attention",), engine.attention_s),
            (("communication",), engine.collective_s), (("wait",), engine.wait_s), (("commit",), engine.commit_s),
            (("launch",), engine.launch_s - engine.attention_s - engine.collective_s),
        ), "part")  # fmt: skip
        ended = [((reason,), number) for reason, number in requests.num_ended.items()]
        yield self._family(counter, "request_success", "Outputs that ended, by reason.", ended, "finished_reason")
        computed_tokens = engine.prompt_tokens + engine.output_tokens
        for kind, name, help, value in (
            (gauge, "num_requests_running", "Outputs being computed.", stats.running),
            (gauge, "num_requests_waiting", "Outputs waiting for a place in the batch.", stats.waiting),
            (gauge, "kv_cache_free_pages", "Free pages of the KV cache after the last step.", stats.free_pages),
            (gauge, "kv_cache_usage_perc", "Share of the KV cache that live outputs hold, from 0 to 1.",
             stats.kv_usage),
            (counter, "prompt_tokens", "Prompt tokens of requests with at least one output token.",
             requests.num_prompt_tokens),
            (counter, "generation_tokens", "Tokens generated.", requests.num_generated),
            (counter, "num_preemptions", "Outputs preempted because the KV cache was full.", engine.preemptions),
            (counter, "prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_queries),
            (counter, "prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_hits),
            (counter, "engine_steps", "Steps of the engine.", engine.steps),
            (counter, "decode_step_time_seconds", "Length of the steps that only decode.", engine.decode_s),
            (counter, "decode_steps", "Steps that only decode.", engine.decode_steps),
            (counter, "computed_tokens", "Tokens that steps computed.", computed_tokens),
            (counter, "engine_restarts", "Restarts of the ranks.", stats.restarts),
        ):  # fmt: skip
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
