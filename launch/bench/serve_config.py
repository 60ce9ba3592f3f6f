"""The options of `lockstep bench serve` as one frozen dataclass, under vLLM's names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...runtime.config import check_bounds, option
from .output_files import require_outputs
from .serve_metrics import METRICS

Backend = Literal["openai", "openai-chat"]
Dataset = Literal["random", "sharegpt", "custom", "prefix_repetition"]
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """The requests, their target and the report; raises ValueError with the option, its value and the rule."""

    backend: Backend = option("openai", "API of the requests: openai for completions, openai-chat for chat completions")
    base_url: str | None = option(None, "URL of the server; http://HOST:PORT if not given")
    host: str = option("127.0.0.1", "host of the server")
    port: int = option(8000, "port of the server")
    endpoint: str | None = option(None, "path of the requests; the backend's if not given")
    tokenizer: str | None = option(
        None,
        "folder or hub id of the tokenizer, the model's if not given; only sharegpt and random chats need it:"
        " random completions are lists of token ids",
    )
    dataset_name: Dataset = option(
        "random", "source of the prompts; random and prefix_repetition are generated, the others are read from a file"
    )
    dataset_path: Path | None = option(
        None, "file to read: ShareGPT's JSON; for custom a .jsonl with a prompt in each line, sent unchanged"
    )
    num_prompts: int = option(1000, "requests; a file with fewer prompts is repeated")
    random_input_len: int = option(1024, "for random: middle of the range of a prompt's tokens, without the prefix")
    random_output_len: int = option(128, "for random: middle of the range of an output's tokens")
    random_range_ratio: float = option(
        0.0,
        "for random: both lengths are uniform in len * (1 -/+ ratio), rounded outwards, as vLLM's (not SGLang's)",
        low=0,
        high=1,
    )
    random_prefix_len: int = option(0, "for random: tokens of a prefix that all prompts share", low=0)
    random_vocab_size: int = option(1000, "generated prompts have token ids below this; the model must have them")
    sharegpt_output_len: int | None = option(
        None, "for sharegpt: tokens of an output; the answer's number if not given"
    )
    custom_output_len: int = option(256, "for custom: maximum tokens of an output")
    prefix_repetition_prefix_len: int = option(256, "for prefix_repetition: tokens of each prefix", low=0)
    prefix_repetition_suffix_len: int = option(
        256, "for prefix_repetition: tokens after the prefix, different for every prompt"
    )
    prefix_repetition_num_prefixes: int = option(
        10, "for prefix_repetition: number of prefixes, which the prompts use equally often"
    )
    prefix_repetition_output_len: int = option(128, "for prefix_repetition: maximum tokens of an output")
    request_rate: float = option(math.inf, "requests per second; inf sends all at once")
    burstiness: float = option(
        1.0, "shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, inf is regular"
    )
    max_concurrency: int | None = option(
        None, "maximum requests in flight; the others wait, and their time is not counted"
    )
    num_warmups: int = option(0, "warm-up requests, all equal to the first one, which are not counted", low=0)
    ignore_eos: bool = option(False, "generate the full output length; random always does")
    temperature: float | None = option(None, "temperature of every request; the server's default if not given", low=0)
    percentile_metrics: str = option("ttft,tpot,itl", f"metrics to report, of {','.join(METRICS)}")
    metric_percentiles: str = option("99", "percentiles to report, separated by commas")
    goodput: list[str] | None = option(
        None, "count requests that meet ttft:MS, tpot:MS and e2el:MS; several may follow"
    )
    label: str | None = option(None, "name of this run, in the results and in the name of their file")
    seed: int = option(0, "seed of lengths, prompts and arrivals", low=0)
    save_result: bool = option(False, "write the results as JSON")
    save_detailed: bool = option(False, "add the times, texts and errors of every request to the results")
    result_dir: Path | None = option(None, "folder for the results; created if it does not exist")
    result_filename: str | None = option(None, "name of the file; made of label, rate, model and date if not given")
    metadata: list[str] | None = option(None, "KEY=VALUE for the results; several may follow")
    ready_check_timeout_sec: int = option(
        600, "seconds to wait for the server, before a first request that must succeed; 0 skips both", low=0
    )
    plot: Path | None = option(None, "draw the distributions of TTFT and ITL into this PNG; needs matplotlib")

    def __post_init__(self) -> None:
        check_bounds(self, as_flags=True)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be above 0; inf is allowed")
        dataset = f"--dataset-name {self.dataset_name}"
        if self.reads_file and self.dataset_path is None:
            raise ValueError(f"{dataset} needs a file; give --dataset-path FILE")
        if self.dataset_path is not None and not self.reads_file:
            raise ValueError(f"{dataset} takes no file; drop --dataset-path or name its dataset")
        for name in ("save_detailed", "result_dir", "result_filename"):
            if getattr(self, name) and not self.save_result:
                raise ValueError(f"{_flag(name)} needs a result file; add --save-result")
        require_outputs(plot=self.plot)
        _ = self.goodput_limits, self.metrics, self.percentiles, self.metadata_pairs  # they raise ValueError

    @property
    def reads_file(self) -> bool:
        """True if the prompts are read from dataset_path."""
        return self.dataset_name in ("sharegpt", "custom")

    @property
    def is_chat(self) -> bool:
        """True if the requests go to chat completions."""
        return self.backend == "openai-chat"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.base_url or f"http://{host}:{self.port}"

    @property
    def path(self) -> str:
        return self.endpoint or ENDPOINTS[self.backend]

    @property
    def metrics(self) -> list[str]:
        """The reported metrics, in the order of METRICS."""
        names = self.percentile_metrics.split(",")
        if unknown := set(names) - set(METRICS):
            raise ValueError(f"--percentile-metrics has {min(unknown)!r}, which is not one of {', '.join(METRICS)}")
        return [name for name in METRICS if name in names]

    @property
    def percentiles(self) -> list[float]:
        """The reported percentiles."""
        rule = f"--metric-percentiles {self.metric_percentiles} must be numbers from 0 to 100, as in 50,90,99"
        try:
            percentiles = [float(p) for p in self.metric_percentiles.split(",")]
        except ValueError as error:
            raise ValueError(rule) from error
        if not all(0 <= p <= 100 for p in percentiles):
            raise ValueError(rule)
        return percentiles

    @property
    def goodput_limits(self) -> dict[str, float]:
        """The limits of --goodput by metric, in seconds."""
        limits = {}
        for pair in self.goodput or []:
            name, _, ms = pair.partition(":")
            try:
                limits[name] = float(ms) / 1e3
            except ValueError:
                limits[name] = -1.0
            if name not in ("ttft", "tpot", "e2el") or not limits[name] >= 0:
                raise ValueError(f"--goodput {pair} must be ttft:MS, tpot:MS or e2el:MS")
        return limits

    @property
    def metadata_pairs(self) -> dict[str, str]:
        """The keys and values of --metadata."""
        pairs = [pair.partition("=") for pair in self.metadata or []]
        if wrong := [key for key, sign, _ in pairs if not sign]:
            raise ValueError(f"--metadata {wrong[0]} must be KEY=VALUE")
        return {key.strip(): value.strip() for key, _, value in pairs}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
