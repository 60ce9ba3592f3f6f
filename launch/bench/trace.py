"""The time of each class of kernels in a Chrome trace of torch.profiler, and the idle time between kernels.

On a GPU the events are kernels, copies and fills. On a CPU they are torch's ops, which nest: each op counts without the
time of the ops inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEVICE_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
# The first pattern that matches a kernel's name gives its class: names of attention kernels also contain those of GEMMs
# (they are made of CUTLASS), and the name of a fused all-reduce also contains its norm.
CLASSES = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|receive_add",
    "attention": r"attention|flashinfer|Batch(Decode|Prefill)|MergeState|partition_keys|fmha",
    "sampling": r"argmax|topk|top_p|candidates|multinomial|sort",
    "product": r"gemm|stream_fp8|gemv|nvjet|cutlass|splitK|aten::(addmm|mm|bmm|linear|matmul)$",
    "norm": r"norm|aten::(mean|rsqrt)$",
    "copy": r"mem(cpy|set)|copy|gather_rows|aten::(cat|clone|fill_|_?index\w*)$",
    "elementwise": r"elementwise|silu|rotate|aten::(__\w+__|bitwise_\w+|floor_divide|remainder|where|any|sum|[lg][et])$"
    r"|aten::(add|sub|mul|div|square|pow|exp|log)_?$",
}


@dataclass(frozen=True)
class TraceEvent:
    """One kernel or op; times in microseconds."""

    name: str
    start: float
    stop: float
    exclusive: float  # the duration without the events inside it


@dataclass(frozen=True)
class KernelTimes:
    """The busy and idle time of a trace, and the shares of the classes."""

    busy_us: float  # the time in which at least one kernel runs
    idle_share: float  # the idle part of the time from the first kernel's start to the last one's end
    exposed_share: float  # the part of this time in which communication runs alone
    shares: dict[str, float]  # class -> its share of all kernels' time, the largest first


def kernel_times(trace: bytes) -> KernelTimes | None:
    """Return the times of the trace's kernels, or of its ops if it has none; None if it has neither."""
    events = read_events(trace) if trace else []
    if not events:
        return None
    busy = union(events)
    span = max(e.stop for e in events) - min(e.start for e in events)
    total = sum(e.exclusive for e in events)
    times: dict[str, float] = {}
    for event in events:
        name = classify(event.name)
        times[name] = times.get(name, 0.0) + event.exclusive
    largest_first = sorted(times.items(), key=lambda item: -item[1])
    exposed = busy - union(e for e in events if classify(e.name) != "communication")
    return KernelTimes(busy, 1 - busy / span, exposed / span, {name: time / total for name, time in largest_first})


def classify(name: str) -> str:
    """Return the class of a kernel or op, by its name."""
    return next((c for c, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def read_events(trace: bytes) -> list[TraceEvent]:
    """Return the kernels of a trace, or its ops if it has none."""
    raw = json.loads(trace)["traceEvents"]
    kernels = [e for e in raw if e.get("cat") in DEVICE_EVENTS]
    if kernels:
        return [TraceEvent(e["name"], e["ts"], e["ts"] + e["dur"], e["dur"]) for e in kernels]
    return _nested([e for e in raw if e.get("cat") == "cpu_op"])


def union(events: Iterable[TraceEvent]) -> float:
    """Return the time in which at least one of the events runs."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.stop - max(event.start, end))
        end = max(end, event.stop)
    return total


def _nested(raw: list[dict[str, Any]]) -> list[TraceEvent]:
    """Return the events of threads, in which one event lies inside another but never across its end."""
    raw = sorted(raw, key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    ends = [(e["tid"], e["ts"] + e["dur"]) for e in raw]
    exclusive = [e["dur"] for e in raw]
    enclosing: list[int] = []
    for i, event in enumerate(raw):
        while enclosing and (event["tid"], event["ts"]) >= ends[enclosing[-1]]:
            enclosing.pop()
        if enclosing:
            exclusive[enclosing[-1]] -= event["dur"]
        enclosing.append(i)
    return [TraceEvent(e["name"], e["ts"], e["ts"] + e["dur"], t) for e, t in zip(raw, exclusive, strict=True)]
