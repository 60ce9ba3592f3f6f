"""`lockstep bench serve`: metrics against numbers worked out by hand, arrivals in virtual time, runs against a stub."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm
from typer.testing import CliRunner, Result

from lockstep.launch.bench import load_client
from lockstep.launch.bench.datasets import DatasetPrompt, make_prompts
from lockstep.launch.bench.load_client import StreamReader, arrivals, send_all
from lockstep.launch.bench.serve_config import ServeBenchConfig
from lockstep.launch.bench.serve_metrics import (
    RequestRecord,
    e2el,
    is_good,
    itls,
    peak_requests,
    peak_tokens,
    samples,
    statistics,
    summary,
    tpot,
    ttft,
)
from lockstep.launch.bench.stream_transport import StreamTransport
from lockstep.launch.cli.main import app
from lockstep.launch.http_client import EventParser
from lockstep.runtime.config import DEMO_MODEL
from lockstep.runtime.tokenizer import Tokenizer

from stub import Stub, completion, conversation, event, refuse, stub_server
from waiting import PATIENCE_S

LABELS = [
    "Successful requests", "Failed requests", "Maximum request concurrency", "Request rate configured (RPS)",
    "Benchmark duration (s)", "Total input tokens", "Total generated tokens", "Request throughput (req/s)",
    "Request goodput (req/s)", "Output token throughput (tok/s)", "Peak output token throughput (tok/s)",
    "Peak concurrent requests", "Total token throughput (tok/s)",
    "Mean TTFT (ms)", "Median TTFT (ms)", "P50 TTFT (ms)", "P99.9 TTFT (ms)",
    "Mean E2EL (ms)", "Median E2EL (ms)", "P50 E2EL (ms)", "P99.9 E2EL (ms)",
]  # fmt: skip
KEYS = [
    "date", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
    "max_output_tokens_per_s", "max_concurrent_requests",
]  # fmt: skip
ARRAYS = ["input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "generated_texts", "errors"]
# Sent at 10, tokens at 10.5, 10.75 and 11.25, a bare finish reason at 11.5.
BY_HAND = RequestRecord(7, started=10.0, chunk_times=[10.5, 10.75, 11.25], ended=11.5, output_len=5)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def serve(stub: Stub, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", f"--base-url={stub.url}", "--random-input-len=5", *arguments])


# -- metrics


def test_metrics_worked_out_by_hand() -> None:
    assert (ttft(BY_HAND), e2el(BY_HAND), itls(BY_HAND)) == (0.5, 1.5, [0.25, 0.5])
    assert tpot(BY_HAND) == (1.5 - 0.5) / 4
    one = RequestRecord(3, started=10.25, chunk_times=[10.5], ended=10.5, output_len=1)
    assert (ttft(one), tpot(one), itls(one)) == (0.25, None, [])
    failed = RequestRecord(3, started=9.0, error="no")
    assert samples([BY_HAND, failed, one]) == {
        "ttft": [0.5, 0.25], "tpot": [0.25], "itl": [0.25, 0.5], "e2el": [1.5, 0.25],
    }  # fmt: skip
    found = summary([BY_HAND, failed, one], 2.0, {"tpot": 0.2})
    assert found == {
        "duration": 2.0, "completed": 2, "failed": 1, "total_input_tokens": 10, "total_output_tokens": 6,
        "request_throughput": 1.0, "request_goodput": 0.5, "output_throughput": 3.0, "total_token_throughput": 8.0,
        "max_output_tokens_per_s": pytest.approx(5 * 2 / 3 + 1), "max_concurrent_requests": 2,
    }  # fmt: skip
    assert summary([failed], 2.0, {})["request_goodput"] is None


def test_statistics_worked_out_by_hand() -> None:
    found = statistics("itl", [0.040, 0.010, 0.030, 0.020], [25, 99.9])
    expected = {"mean": 25, "median": 25, "std": math.sqrt(125), "p25": 17.5, "p99.9": 39.97}
    assert found == pytest.approx({f"{k}_itl_ms": v for k, v in expected.items()})
    assert set(statistics("itl", [], [99]).values()) == {0.0}


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 0.5}, True),
        ({"ttft": 0.49}, False),
        ({"e2el": 1.5, "tpot": 0.25}, True),
        ({"e2el": 9, "tpot": 0.2}, False),
    ],
)
def test_good_request_exceeds_no_limit(limits: dict[str, float], good: bool) -> None:
    assert is_good(BY_HAND, limits) == good


GAPS = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.integers(0, 20), GAPS), min_size=1, max_size=8))
def test_peaks_equal_brute_force(drawn: list[tuple[int, list[int]]]) -> None:
    """Times in quarters of a second, which floats hold exactly; two tokens a chunk."""
    records = []
    for start, gaps in drawn:
        times = [start / 4 + float(t) / 4 for t in np.cumsum(gaps)]
        records.append(RequestRecord(1, start / 4, times, times[-1], 2 * len(times)))
    first = min(r.started for r in records)
    buckets = [sum(2 for r in records for t in r.chunk_times if s <= t - first < s + 1) for s in range(40)]
    assert peak_tokens(records) == max(buckets)
    assert peak_requests(records) == max(sum(r.started <= t / 4 < r.ended for r in records) for t in range(100))


def test_chunks_become_a_record() -> None:
    """As servers send them: the role first, two tokens in one chunk, one without certain text yet, the end, usage."""
    pieces = [
        (1.0, event(choices=[{"delta": {"role": "assistant", "content": ""}}])),
        (2.0, event(choices=[{"delta": {"role": "assistant", "content": "In the"}}])),
        (3.0, event(choices=[{"delta": {"content": ""}}])),
        (4.0, event(choices=[{"delta": {"content": " beginning"}}])),
        (5.0, event(choices=[{"delta": {}, "finish_reason": "stop"}])),
        (6.0, event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 4}) + b"data: [DONE]\n\n"),
    ]
    reader, events = StreamReader(RequestRecord(0, started=0.5)), EventParser()
    for now, piece in pieces:
        for chunk in events.push(piece):
            reader.add(chunk, now)
    reader.end()
    assert reader.record == RequestRecord(9, 0.5, [2.0, 3.0, 4.0], 5.0, 4, "In the beginning")


def test_single_chunk_without_usage_counts_as_a_token() -> None:
    reader = StreamReader(RequestRecord(3))
    for chunk in EventParser().push(event(choices=[{"text": "", "finish_reason": "stop"}])):
        reader.add(chunk, 1.0)
    reader.end()
    assert (reader.record.chunk_times, reader.record.output_len, reader.record.prompt_len) == ([1.0], 1, 3)


@given(st.lists(st.text(min_size=1), max_size=5), st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_events_survive_any_cut(texts: list[str], cuts: list[int]) -> None:
    """Line and paragraph separators, which JSON need not escape, are part of a text."""
    texts = [*texts, "a\N{LINE SEPARATOR}b\x85"]
    body = b": a comment\n\n" + b"".join(event(choices=[{"text": text}]) for text in texts) + b"data: [DONE]\n\n"
    at, events, found = 0, EventParser(), []
    for cut in cuts:
        found += list(events.push(body[at : at + cut]))
        at += cut
    found += list(events.push(body[at:]))
    assert [chunk.choices[0].new_text for chunk in found] == texts


# -- arrivals and order


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(4000, 8.0, 1.0, 3)
    assert times == arrivals(4000, 8.0, 1.0, 3) != arrivals(4000, 8.0, 1.0, 4)
    assert times[-1] == pytest.approx(4000 / 8)
    gaps = np.sort(np.diff([0, *times]))
    empirical, exponential = np.arange(1, 4001) / 4000, 1 - np.exp(-8 * gaps)
    assert np.abs(empirical - exponential).max() < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_gaps_of_the_burstiness(burstiness: float) -> None:
    gaps = np.diff([0, *arrivals(20000, 5.0, burstiness, 0)])
    assert gaps.min() >= 0
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)


def test_arrivals_at_the_limits() -> None:
    assert arrivals(3, math.inf, 1.0, 0) == [0, 0, 0]
    assert arrivals(4, 2.0, math.inf, 0) == [0.5, 1.0, 1.5, 2.0]


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[VirtualLoop]:
    found = VirtualLoop()
    monkeypatch.setattr(load_client.time, "perf_counter", found.time)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("cap", "starts"),
    [(None, [0.25, 0.5, 0.75, 4.0, 4.25]), (2, [0.25, 0.5, 1.25, 4.0, 4.25]), (1, [0.25, 1.25, 2.25, 4.0, 5.0])],
)
def test_requests_start_in_order_and_within_the_cap(loop: VirtualLoop, cap: int | None, starts: list[float]) -> None:
    """Five requests of a second each."""

    async def ask(prompt: DatasetPrompt) -> RequestRecord:
        started = loop.time()
        await asyncio.sleep(1.0)
        return RequestRecord(prompt.num_tokens, started, [loop.time()], loop.time(), 1)

    prompts, times = [DatasetPrompt("", i, 1) for i in range(5)], [0.25, 0.5, 0.75, 4.0, 4.25]
    with tqdm(disable=True) as bar:
        records = loop.run_until_complete(send_all(prompts, times, ask, cap, bar))
    assert [r.prompt_len for r in records] == [0, 1, 2, 3, 4]
    assert [r.started for r in records] == starts
    assert peak_requests(records) <= (cap or 5)


# -- prompts


def test_random_prompts_have_the_requested_lengths() -> None:
    load = ServeBenchConfig(
        num_prompts=3000, random_input_len=10, random_output_len=3, random_range_ratio=0.25, random_prefix_len=4,
        random_vocab_size=50,
    )  # fmt: skip
    found = make_prompts(load, None)
    assert found == make_prompts(load, None)
    assert {p.num_tokens for p in found} == {4 + n for n in range(7, 14)}  # 7.5 to 12.5, rounded outwards
    assert {p.output_len for p in found} == {2, 3, 4}
    assert len({tuple(p.content[:4]) for p in found}) == 1
    assert {i for p in found for i in p.content[4:]} == set(range(50))
    assert all(len(p.content) == p.num_tokens for p in found)


def test_prefix_repetition_uses_prefixes_equally() -> None:
    load = ServeBenchConfig(
        dataset_name="prefix_repetition", num_prompts=11, prefix_repetition_num_prefixes=3,
        prefix_repetition_prefix_len=8, prefix_repetition_suffix_len=5, prefix_repetition_output_len=9,
    )  # fmt: skip
    found = make_prompts(load, None)
    prefixes = [tuple(p.content[:8]) for p in found]
    assert sorted(prefixes.count(p) for p in set(prefixes)) == [3, 4, 4]
    assert len({tuple(p.content) for p in found}) == 11
    assert {(p.num_tokens, p.output_len) for p in found} == {(13, 9)}


def test_random_chats_are_texts_of_the_requested_lengths() -> None:
    tokenizer = Tokenizer(Path(DEMO_MODEL))
    load = ServeBenchConfig(backend="openai-chat", num_prompts=40, random_input_len=30, random_range_ratio=0.5)
    found, ids = make_prompts(load, tokenizer), make_prompts(load, None)
    assert [p.num_tokens for p in found] == [len(tokenizer.encode(str(p.content))) for p in found]
    off = np.array([p.num_tokens - asked.num_tokens for p, asked in zip(found, ids, strict=True)])
    assert np.mean(off == 0) > 0.7  # some lengths have no text that was tried
    assert np.abs(off).max() <= 4


def test_prompts_from_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Path(DEMO_MODEL))
    path = tmp_path / "file"
    talks = [
        ["And the king said unto them", "Behold, I will speak unto thee"],
        ["And the king " * 500, "no " * 9],
        ["A", "B"],
    ]
    path.write_text(json.dumps([{"conversations": [{"from": "x", "value": t} for t in talk]} for talk in talks]))
    load = ServeBenchConfig(dataset_name="sharegpt", dataset_path=path, num_prompts=2)
    question, answer = (len(tokenizer.encode(text)) for text in talks[0])
    assert (
        make_prompts(load, tokenizer) == [DatasetPrompt(talks[0][0], question, answer)] * 2
    )  # too long, too short: left out
    path.write_text('{"prompt": "one\N{LINE SEPARATOR}"}\n\n{"prompt": "two"}\n{"other": 3}\n')
    custom = make_prompts(
        ServeBenchConfig(dataset_name="custom", dataset_path=path, num_prompts=5, custom_output_len=6), None
    )
    assert {p.content for p in custom} == {"one\N{LINE SEPARATOR}", "two"}
    assert [p.content for p in custom[:2]] == [p.content for p in custom[2:4]]
    assert {p.output_len for p in custom} == {6}


# -- the command


def test_run_against_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    goals = ["--goodput", "ttft:10000", "e2el:0", "--metadata", "gpu=none", "tp=2"]
    with stub_server(completion) as stub:
        stub.holds = lambda: len(stub.bodies) > 3 and stub.most_in_flight < 3
        ended = serve(
            stub, "--num-prompts=9", "--max-concurrency=3", "--random-output-len=4", "--request-rate=500", *goals,
            "--num-warmups=2", "--temperature=0", "--percentile-metrics=e2el,ttft", "--metric-percentiles=50,99.9",
            "--save-result", "--save-detailed", f"--result-dir={tmp_path / 'new'}", "--label=mine",
        )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    assert re.findall(r"^(.+?): +[\d.]+ *$", ended.stdout, re.M) == LABELS
    assert ended.stdout.count(" Serving Benchmark Result ") == 1
    assert re.search(r"^Successful requests: {20} 9 +$", ended.stdout, re.M)
    sent = stub.bodies[3:]  # after one to see whether it works, and the warm-up
    assert stub.bodies[:3] == [sent[0]] * 3
    assert len(sent) == 9
    common = {"model": "stub", "stream": True, "temperature": 0, "ignore_eos": True, "max_tokens": 4}
    assert all(body.items() >= common.items() and len(body["prompt"]) == 5 for body in sent)
    assert set(stub.paths) == {"/v1/completions"}
    assert all("authorization: Bearer secret" in head for head in stub.headers)
    assert stub.most_in_flight == 3
    (path,) = (tmp_path / "new").iterdir()
    assert re.fullmatch(r"mine-500.0qps-concurrency3-stub-\d{8}-\d{6}\.json", path.name)
    found = json.loads(path.read_text())
    times = [f"{key}_{name}_ms" for name in ("ttft", "e2el") for key in ("mean", "median", "std", "p50", "p99.9")]
    assert set(found) == {*KEYS, *times, *ARRAYS, "gpu", "tp"}
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (
        9,
        0,
        45,
        36,
    )
    assert (found["gpu"], found["tp"], found["request_goodput"], found["model_id"]) == ("none", "2", 0, "stub")
    assert found["generated_texts"] == ["xxxx"] * 9
    assert [len(gaps) for gaps in found["itls"]] == [3] * 9
    assert found["median_ttft_ms"] == pytest.approx(sorted(found["ttfts"])[4] * 1e3)
    assert found["mean_e2el_ms"] == pytest.approx(sum(found["latencies"]) / 9 * 1e3)
    assert all(
        sum(gaps) + first <= last + 1e-9
        for gaps, first, last in zip(found["itls"], found["ttfts"], found["latencies"], strict=True)
    )


def test_requests_and_results_are_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    flags = ["--num-prompts=8", "--max-concurrency=1", "--random-output-len=5", "--random-range-ratio=0.8", "--seed=5"]
    with stub_server(completion) as stub:
        ended = serve(stub, *flags, "--save-result", f"--result-dir={tmp_path}", "--result-filename=a.json")
    assert ended.exit_code == 0, ended.output
    load = ServeBenchConfig(num_prompts=8, random_input_len=5, random_output_len=5, random_range_ratio=0.8, seed=5)
    prompts = make_prompts(load, None)
    assert [(b["prompt"], b["max_tokens"]) for b in stub.bodies[1:]] == [(p.content, p.output_len) for p in prompts]
    found = json.loads((tmp_path / "a.json").read_text())
    assert not set(ARRAYS) & set(found)
    assert found["total_output_tokens"] == sum(p.output_len for p in prompts)
    assert found["request_rate"] == "inf"


def test_run_with_chat_requests(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "in the beginning"}\n')
    with stub_server(conversation) as stub:
        ended = serve(
            stub, "--backend=openai-chat", "--dataset-name=custom", f"--dataset-path={path}", "--num-prompts=2",
            "--model=named", "--ready-check-timeout-sec=0", "--custom-output-len=17",
        )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    body = {
        "model": "named", "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 17,
        "messages": [{"role": "user", "content": "in the beginning"}],
    }  # fmt: skip
    assert stub.bodies == [body] * 2
    assert stub.paths == ["/v1/chat/completions"] * 2
    assert re.search(r"^Total input tokens: +14 ", ended.stdout, re.M)
    assert re.search(r"^Total generated tokens: +6 ", ended.stdout, re.M)


BROKEN = {
    1: (refuse(429, "too busy"), "HTTP 429: too busy"),
    2: ([completion(0, {"prompt": [1], "max_tokens": 2})[0], event(error={"message": "it fell"})], "it fell"),
    3: (
        completion(0, {"prompt": [1], "max_tokens": 3})[:3],
        "the stream ended after 2 chunks, without a finish reason",
    ),
    4: ([], "Server disconnected without sending a response."),
    5: ([b"HTTP/1.1 200 OK\r\n\r\ndata: {nonsense\n\n"], "JSON is malformed"),
    6: ([b"HTTP/1.1 200 OK\r\n\r\n" + event(choices=3)], "Expected `array`, got `int`"),
}


def test_failures_are_counted_and_the_first_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def reply(number: int, body: dict[str, Any]) -> list[bytes]:
        return BROKEN[number - 1][0] if number - 1 in BROKEN else completion(number, body)

    with stub_server(reply) as stub:
        ended = serve(
            stub, "--num-prompts=8", "--max-concurrency=1", "--random-output-len=2", "--save-result", "--save-detailed",
            f"--result-dir={tmp_path}", "--result-filename=a.json",
        )  # fmt: skip
    assert ended.exit_code == 0, ended.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["completed"], found["failed"], found["total_output_tokens"]) == (2, 6, 4)
    for number, (_, message) in BROKEN.items():
        assert message in found["errors"][number]
    assert [bool(error) for error in found["errors"]] == [i in BROKEN for i in range(8)]
    assert found["output_lens"] == [2, 0, 0, 0, 0, 0, 0, 2]
    assert "6 of 8 requests failed; the first one: HTTP 429: too busy" in caplog.text


def test_run_with_only_failures_exits_with_1() -> None:
    with stub_server(lambda number, body: refuse(500, "down")) as stub:
        ended = serve(stub, "--num-prompts=3", "--ready-check-timeout-sec=0")
    assert ended.exit_code == 1
    assert re.search(r"^Failed requests: +3 ", ended.stdout, re.M)


def test_refused_first_request_ends_the_run() -> None:
    with stub_server(lambda number, body: refuse(400, "no such model")) as stub:
        ended = serve(stub)
    assert isinstance(ended.exception, ValueError)
    assert "does not answer the first request: HTTP 400: no such model" in str(ended.exception)
    assert len(stub.bodies) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-prompts=0"], "--num-prompts 0 must be at least 1"),
        (["--request-rate=0"], "--request-rate 0.0 must be above 0"),
        (["--burstiness=nan"], "--burstiness nan must be above 0"),
        (["--random-range-ratio=1.5"], "--random-range-ratio 1.5 must be between 0 and 1"),
        (["--dataset-name=sharegpt"], "sharegpt needs a file; give --dataset-path"),
        (["--dataset-path=x"], "random takes no file; drop --dataset-path"),
        (["--percentile-metrics=ttft,speed"], "'speed', which is not one of ttft, tpot, itl, e2el"),
        (["--metric-percentiles=101"], "--metric-percentiles 101 must be numbers from 0 to 100"),
        (["--goodput", "ttft:500", "itl:3"], "--goodput itl:3 must be ttft:MS"),
        (["--metadata", "a=1", "b"], "--metadata b must be KEY=VALUE"),
        (["--save-detailed"], "--save-detailed needs a result file; add --save-result"),
        (["--plot=/nowhere/x.png"], "there is no folder /nowhere"),
        (["--save-result", "--result-filename=/tmp"], "cannot write /tmp: it is a folder"),
        (["--save-result", "--result-dir=/dev/null"], "cannot make the folder /dev/null: File exists"),
        (["--base-url=localhost:80"], "localhost:80 is not the URL of a server"),
        (["--port=9", "--ready-check-timeout-sec=0"], r"http://127.0.0.1:9 does not answer: .*; start it, or set"),
    ],
)
def test_invalid_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["bench", "serve", *arguments], catch_exceptions=False)


def test_waiting_for_a_server_is_announced_at_once(caplog: pytest.LogCaptureFixture) -> None:
    options = ["--base-url=http://127.0.0.1:9", "--ready-check-timeout-sec=1"]
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 does not answer"):
        CliRunner().invoke(app, ["bench", "serve", *options], catch_exceptions=False)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("http://127.0.0.1:9 does not answer (")
    assert line.endswith("waiting for up to 1 s")


def test_plot_without_matplotlib_is_refused_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with stub_server(completion) as stub:
        ended = serve(stub, f"--plot={tmp_path / 'a.png'}")
    assert "--plot needs matplotlib" in str(ended.exception)
    assert stub.bodies == []


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with stub_server(completion) as stub:
        ended = serve(stub, "--num-prompts=4", "--random-output-len=3", f"--plot={tmp_path / 'a.png'}")
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- the transport


def test_transport_reads_what_httpx_reads() -> None:
    """Bodies with a length, in chunks and until the end of the connection; connections are used again."""
    texts = ["", "a", "b" * 100_000]
    seen: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                seen.append(writer.get_extra_info("peername")[1])
                kind, number = re.findall(r"/(\w+)/(\d)", request)[0]
                body = texts[int(number)].encode()
                early = b"HTTP/1.1 103 Early Hints\r\n\r\n" if number == "1" else b""
                if kind == "sized":
                    writer.write(early + b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
                elif kind == "chunked":
                    pieces = [body[i : i + 70_001] for i in range(0, len(body), 70_001)]
                    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
                    writer.write(b"HTTP/1.1 201 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
                    await writer.drain()
                    break
        writer.close()

    async def get_all(client: httpx.AsyncClient) -> list[tuple[int, str]]:
        paths = [f"/{kind}/{number}" for number in range(len(texts)) for kind in ("sized", "chunked", "ended")]
        return [(response.status_code, response.text) for response in [await client.get(path) for path in paths]]

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as plain:
            expected = await get_all(plain)
        seen.clear()
        async with httpx.AsyncClient(base_url=url, transport=StreamTransport(), timeout=PATIENCE_S) as client:
            assert await get_all(client) == expected
        assert len(set(seen)) == len(texts), "each connection serves until it is closed"
        server.close()

    asyncio.run(main())
