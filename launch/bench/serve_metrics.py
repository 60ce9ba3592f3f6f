"""TTFT, TPOT, ITL and E2EL as functions of the times at which the chunks of an answer arrived, under vLLM's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass
class RequestRecord:
    """One request as its client saw it, with times in seconds of one clock; a failed request has an error."""

    prompt_len: int
    started: float = 0.0  # time at which it was sent
    chunk_times: list[float] = field(default_factory=list)  # arrival times of the chunks with tokens
    ended: float = 0.0  # arrival time of the last chunk
    output_len: int = 0
    text: str = ""
    error: str = ""


def ttft(record: RequestRecord) -> float:
    """Return the time to first token: sent -> first chunk with a token."""
    return record.chunk_times[0] - record.started


def e2el(record: RequestRecord) -> float:
    """Return the end-to-end latency: sent -> last chunk."""
    return record.ended - record.started


def tpot(record: RequestRecord) -> float | None:
    """Return the time per output token: (E2EL - TTFT) / (output tokens - 1); None for one token."""
    return (e2el(record) - ttft(record)) / (record.output_len - 1) if record.output_len > 1 else None


def itls(record: RequestRecord) -> list[float]:
    """Return the inter-token latencies: the gaps between chunks, each with any number of tokens."""
    return [later - earlier for earlier, later in pairwise(record.chunk_times)]


def samples(records: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Return the seconds of each metric, of the requests that were answered."""
    answered = [r for r in records if not r.error]
    return {
        "ttft": [ttft(r) for r in answered],
        "tpot": [t for r in answered if (t := tpot(r)) is not None],
        "itl": [gap for r in answered for gap in itls(r)],
        "e2el": [e2el(r) for r in answered],
    }


def statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Return mean, median, standard deviation and percentiles in ms, under vLLM's keys; 0 without samples."""
    ms = np.array(seconds or [0.0]) * 1e3
    values = {"mean": np.mean(ms), "median": np.median(ms), "std": np.std(ms)}
    values |= {f"p{p:g}": np.percentile(ms, p) for p in percentiles}
    return {f"{key}_{name}_ms": float(value) for key, value in values.items()}


def summary(records: Sequence[RequestRecord], duration: float, goodput_limits: Mapping[str, float]) -> dict[str, Any]:
    """Return counts and rates over `duration` seconds.

    goodput_limits  the largest value of each metric in seconds with which a request counts as good
    """
    answered = [r for r in records if not r.error]
    inputs, outputs = sum(r.prompt_len for r in answered), sum(r.output_len for r in answered)
    return {
        "duration": duration,
        "completed": len(answered),
        "failed": len(records) - len(answered),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(answered) / duration,
        "request_goodput": sum(is_good(r, goodput_limits) for r in answered) / duration if goodput_limits else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": peak_tokens(answered),
        "max_concurrent_requests": peak_requests(answered),
    }


def details(records: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    """Return lists with one entry for each request in the order of the prompts; zeros for failed requests."""
    return {
        "input_lens": [r.prompt_len for r in records],
        "output_lens": [0 if r.error else r.output_len for r in records],
        "ttfts": [0.0 if r.error else ttft(r) for r in records],
        "itls": [[] if r.error else itls(r) for r in records],
        "latencies": [0.0 if r.error else e2el(r) for r in records],
        "start_times": [r.started for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error for r in records],
    }


def is_good(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    """Return True if no metric of a request exceeds its limit in seconds; an output of one token has a TPOT of 0."""
    times = {"ttft": ttft(record), "tpot": tpot(record) or 0.0, "e2el": e2el(record)}
    return all(times[name] <= limit for name, limit in limits.items())


def peak_tokens(answered: Sequence[RequestRecord]) -> float:
    """Return the most output tokens in one second since the first request; chunks share an answer's tokens equally."""
    if not answered:
        return 0.0
    first = min(r.started for r in answered)
    seconds = np.concatenate([np.array(r.chunk_times) - first for r in answered]).astype(int)
    tokens = np.concatenate([np.full(len(r.chunk_times), r.output_len / len(r.chunk_times)) for r in answered])
    return float(np.bincount(seconds, tokens).max())


def peak_requests(answered: Sequence[RequestRecord]) -> int:
    """Return the most requests in flight at once; a request that ends when another starts does not overlap it."""
    changes = sorted([(r.started, 1) for r in answered] + [(r.ended, -1) for r in answered])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0
