"""Counters and latencies of requests as clients see them, which add up over the processes that answer."""

from __future__ import annotations

import time
from collections import Counter

import msgspec

from ...runtime.outputs import Event
from ...runtime.stats import Distribution, distribution

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
LENGTHS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))  # tokens
REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)


class RequestMetrics(msgspec.Struct):
    """Counts of prompts and outputs, and the distributions of their times and lengths."""

    num_prompt_tokens: int = 0
    num_generated: int = 0
    num_ended: dict[str, int] = {}  # outputs by the reason of their end
    first_token_s: Distribution = distribution(TTFT_S)
    inter_token_s: Distribution = distribution(TOKEN_S)
    per_token_s: Distribution = distribution(TOKEN_S)
    prompt_length: Distribution = distribution(LENGTHS)
    output_length: Distribution = distribution(LENGTHS)
    longest_output: Distribution = distribution(LENGTHS)
    decoding_s: Distribution = distribution(REQUEST_S)
    end_to_end_s: Distribution = distribution(REQUEST_S)

    def count_end(self, reason: str) -> None:
        """Count an output that ended for `reason`."""
        self.num_ended[reason] = self.num_ended.get(reason, 0) + 1

    def __add__(self, other: RequestMetrics) -> RequestMetrics:
        ended = Counter(self.num_ended) + Counter(other.num_ended)
        names = [name for name in self.__struct_fields__ if name != "num_ended"]
        return RequestMetrics(
            num_ended=dict(ended), **{name: getattr(self, name) + getattr(other, name) for name in names}
        )


class PromptTimer:
    """Observes the latencies of one prompt's outputs."""

    def __init__(self, metrics: RequestMetrics, n: int = 1) -> None:
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
            self._metrics.inter_token_s.observe((now - last) / num_new)
        self._last[index] = now
        self._metrics.num_generated += num_new
        self._num_tokens[index] += num_new
        if event.finish_reason is not None:
            self._end(index, event.finish_reason, now)

    def _begin(self, event: Event, now: float) -> None:
        """Observe the first event of an output."""
        metrics = self._metrics
        if not self._first:
            metrics.num_prompt_tokens += len(event.prompt_token_ids)
            metrics.prompt_length.observe(len(event.prompt_token_ids))
            metrics.first_token_s.observe(now - self._start)
        self._first[event.index], self._num_tokens[event.index] = now, 0

    def _end(self, index: int, reason: str, now: float) -> None:
        """Observe the end of an output."""
        metrics, num_tokens, decode_s = self._metrics, self._num_tokens[index], now - self._first[index]
        metrics.count_end(reason)
        metrics.end_to_end_s.observe(now - self._start)
        metrics.output_length.observe(num_tokens)
        metrics.decoding_s.observe(decode_s)
        self._num_ended += 1
        if self._num_ended == self._n:
            metrics.longest_output.observe(max(self._num_tokens.values()))
        if num_tokens > 1:
            metrics.per_token_s.observe(decode_s / (num_tokens - 1))
